"""The built-in data and its checker, which must be right before anything it says about a model counts."""
import numpy as np
import pytest
from PIL import Image, ImageFilter

from data import (BACKGROUND, COLOURS, HELD_OUT_PAIRS, KINDS, PAIRS, RADII, RELATIONS, SHAPES, Scene, Shapes,
                  Thing, check, is_held_out, parse, render)

SCENES = [Shapes("train").scene(i) for i in range(1000)] + [Shapes("val").scene(i) for i in range(500)]


def meaning(scene: Scene) -> frozenset:
    """What a scene shows, however it is told: where each thing is relative to the other."""
    dx, dy = RELATIONS[scene.relation] if scene.relation else (0, 0)
    return frozenset((thing, (dx * sign, dy * sign)) for thing, sign in zip(scene.things, (1, -1)))


def one_change(scene: Scene):
    """Every caption that differs from the scene's own in one respect, with the kind of change."""
    things, relation = scene.things, scene.relation
    for i, thing in enumerate(things):
        others = {"size": RADII, "shape": SHAPES,
                  "colour": [c for c in COLOURS if c not in {t.colour for t in things}]}
        for kind, values in others.items():
            for value in set(values) - {getattr(thing, kind)}:
                yield kind, Scene(
                    (*things[:i], thing._replace(**{kind: value}), *things[i + 1:]), relation, ())
    if relation is None:
        other = next(c for c in COLOURS if c != things[0].colour)
        yield "extra", Scene((things[0], Thing("", other, "circle")), "above", ())
    else:
        for other in set(RELATIONS) - {relation}:
            yield "relation", Scene(things, other, ())
        yield "swapped", Scene(things[::-1], relation, ())
        yield "missing", Scene(things[:1], None, ())


def test_rendering_equals_supersampling() -> None:
    """The anti-aliasing against 16×16 samples per pixel of the plain inside test."""
    fine = (np.mgrid[:512, :512] + 0.5) / 16
    inside = {
        "circle": lambda x, y, r: x * x + y * y < r * r,
        "square": lambda x, y, r: np.maximum(abs(x), abs(y)) < 0.886 * r,
        "triangle": lambda x, y, r: (y < 1.02 * r) & (0.866 * abs(x) - 0.5 * (y - 0.34 * r) < 0.68 * r),
        "cross": lambda x, y, r: ((np.maximum(abs(x), abs(y)) < 1.05 * r)
                                  & (np.minimum(abs(x), abs(y)) < 0.35 * r))}
    for shape, size in [(shape, size) for shape in SHAPES for size in RADII]:
        x, y = 15.3, 16.7
        image = render(Scene((Thing(size, "white", shape),), None, ((x, y),)))
        mask = inside[shape](fine[1] - x, fine[0] - y, RADII[size]).reshape(32, 16, 32, 16).mean((1, 3))
        error = np.abs((image[..., 0] - BACKGROUND) / (250 - BACKGROUND) - mask)
        assert error.max() < 0.3 and error.mean() < 0.004, f"{size} {shape} is drawn wrongly"


def test_checker_accepts_true_pairs() -> None:
    passed = [check(render(scene), scene.caption())["all"] for scene in SCENES]
    assert np.mean(passed) >= 0.99, "the checker would undercount right pictures"


def test_checker_refuses_pairs_with_one_change() -> None:
    misjudged: dict[str, list[bool]] = {}
    for scene in SCENES[:60] + SCENES[1000:1020]:
        image = render(scene)
        for kind, changed in one_change(scene):
            wrong = {name for name, is_right in check(image, changed.caption()).items() if not is_right}
            is_named = wrong == {kind, "all"} if kind in ("size", "shape", "relation") else "all" in wrong
            misjudged.setdefault(kind, []).append(not is_named)
    assert set(misjudged) == {"size", "shape", "colour", "relation", "swapped", "missing", "extra"}
    for kind, results in misjudged.items():
        assert np.mean(results) <= 0.01, f"the checker would count pictures with a wrong {kind} as right"


def test_checker_refuses_what_the_caption_does_not_mention() -> None:
    scene = Scene((Thing("", "red", "circle"), Thing("", "blue", "square")), "above", ((16, 8), (16, 24)))
    good = render(scene)
    ground, blue = (good == BACKGROUND).all(-1), (good == COLOURS["blue"]).all(-1)
    square, lighter, specks, red_specks, cyan = (good.copy() for _ in range(5))
    square[12:20, :8], lighter[ground], cyan[blue] = 125, 115, (0, 200, 255)
    for k, colour in enumerate(("green", "yellow", "purple", "white")):
        specks[8 * k:8 * k + 3, :3] = COLOURS[colour]
    red_specks[1:4, 1:4] = red_specks[28:31, 1:4] = COLOURS["red"]
    assert check(good, scene.caption())["all"]
    for name, image in (("grey square", square), ("light ground", lighter), ("specks", specks),
                        ("red specks", red_specks), ("cyan for blue", cyan)):
        assert not check(image, scene.caption())["all"], f"the checker would count a {name} as right"


def test_checker_calls_a_blurred_blob_no_shape() -> None:
    scene = Scene((Thing("", "red", "circle"),), None, ((16, 16),))
    for blur, is_shape in ((1, True), (2.5, False)):
        image = np.asarray(Image.fromarray(render(scene)).filter(ImageFilter.GaussianBlur(blur)))
        assert check(image, scene.caption())["shape"] == is_shape, "a circle still fits it best"


def test_checker_bears_noise_and_refuses_nonsense() -> None:
    rng = np.random.default_rng(0)
    noisy = [check(np.clip(render(s) + rng.normal(0, 10, (32, 32, 3)), 0, 255).astype(np.uint8),
                   s.caption())["all"] for s in SCENES[:300]]
    assert np.mean(noisy) >= 0.97
    for scene in SCENES[:50]:
        assert not check(rng.integers(0, 256, (32, 32, 3), np.uint8), scene.caption())["all"]
        for level in (0, 32, 128, 255):
            assert not check(np.full((32, 32, 3), level, np.uint8), scene.caption())["all"]


def test_held_out_pairs_never_occur_in_training() -> None:
    assert 0.15 < len(HELD_OUT_PAIRS) / len(PAIRS) < 0.25
    for scene in SCENES[:1000]:
        kinds = tuple(tuple(thing[1:]) for thing in scene.things)
        assert len(kinds) == 1 or not is_held_out(kinds), f"{scene.caption()} is held out"
    assert (is_held_out((("blue", "square"), ("red", "circle")))
            and is_held_out((("red", "circle"), ("blue", "square"))))
    trained = {word for i in range(3000) for word in Shapes().captions(i)[0].split()}
    assert {word for i in range(864) for word in Shapes("val").captions(i)[0].split()} <= trained


def test_validation_scenes_all_differ_in_meaning() -> None:
    val = Shapes("val")
    assert len(val) >= 500 and len({meaning(val.scene(i)) for i in range(len(val))}) == len(val), \
        "two captions of one meaning would make retrieval ambiguous"


def test_scenes_depend_on_seed_and_index_alone() -> None:
    first, again, other = Shapes(seed=1), Shapes(seed=1), Shapes(seed=2)
    backwards = [again.scene(i) for i in reversed(range(50))]
    assert [first.scene(i) for i in range(50)] == backwards[::-1]
    assert [other.scene(i) for i in range(50)] != backwards[::-1]
    told = [[KINDS.index(thing[1:]) for thing in scene.things] for scene in SCENES if scene.relation]
    assert 0.4 < np.mean([first < second for first, second in told]) < 0.6, "told from either side"
    labels = [Shapes("classes").read(i) for i in range(48)]
    assert all(Shapes("classes").classes[s.label] in s.captions[0] for s in labels)


def test_parse_is_the_inverse_of_caption() -> None:
    for scene in SCENES[:200]:
        assert parse(scene.caption()) == (scene.things, scene.relation)
    for other in ("a dog on a beach", "a red circle above a small red square"):
        with pytest.raises(ValueError, match="grammar"):
            parse(other)
