"""Scores against slow references, and the mistakes an evaluation of this model must not make."""
import inspect
import json
import math
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import build, error_of, tiny_clip_config, tiny_config
from PIL import Image
from torch.nn import functional as F

import evaluate
import model as models
import sample
from data import BadSample, Shapes, Source, evenly_spaced, fill
from diffusion import generator_of, make_alphas_cumprod
from evaluate import Reading, ranks_of_best_match, score, wilson
from sample import denoise_queries, draw_queries


class Oracle:
    """Stands in for a perfect model: it reads a picture's number from its first pixel and knows that text's
    query. `copies` makes it the opposite: all it returns is the noised query or latents that it was given."""

    def __init__(self, model, texts: list[str], copies: bool = False) -> None:
        self.inner, self.copies, self.unet = model, copies, self
        self.queries = model.encode_text(texts)[1]

    def __getattr__(self, name: str):        # everything else is the model's
        return getattr(self.inner, name)

    def numbers(self, latents):
        return ((self.inner.decode_image(latents)[:, 0, 0, 0] + 1) * 127.5).round().long()

    def denoise_query(self, noisy_query, t_text, latents, null):
        return noisy_query if self.copies else self.queries[self.numbers(latents) % len(self.queries)]

    def denoise_image(self, noisy_latents, t_image, context):
        return noisy_latents


class Numbered(Source):
    """Picture i has colour i; it has two captions of its own, and label i % 5."""

    def __init__(self, count: int) -> None:
        super().__init__("numbered")
        self.rows, self.classes = range(count), [f"kind{k}" for k in range(5)]
        self.labels = [i % 5 for i in range(count)]

    def captions(self, index: int) -> list[str]:
        return [f"picture {self.rows[index]}", f"image {self.rows[index]}"]

    def image(self, index: int, side: int | None = None) -> Image.Image:
        return Image.fromarray(np.full((32, 32, 3), self.rows[index], np.uint8))


TEXTS = [f"picture {i}" for i in range(100)]
KINDS = [f"a photo of a kind{k}" for k in range(5)]
CONTROLS = ("shuffle-images", "no-image", "shuffle-labels")


def test_a_perfect_model_scores_perfectly_and_every_control_is_chance(base) -> None:
    oracle, source = Oracle(base, TEXTS), Numbered(100)
    result = evaluate.retrieval(oracle, source)
    assert result["i2t_r1"] == 1.0 and result["n"] == 100 and result["n_texts"] == 200
    for control in CONTROLS:
        result = evaluate.retrieval(oracle, source, Reading(control=control))
        assert result["chance"] == pytest.approx(0.01), "2 of 200 texts are right"
        for name in ("i2t_r1", "t2i_r1"):
            assert result[f"{name}_interval"][0] <= 0.03 and result[name] <= 0.06, f"{control}: above chance"


class ClipOracle(models.Clip):
    """A perfect CLIP: it reads a picture's number from its first pixel and knows that text's embedding."""

    def encode_image(self, images):
        number = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
        return self.encode_text(KINDS)[1][number % 5]


class DrawingOracle(Oracle):
    """A perfect drawer: it knows the noise, if the context is that of the image's class, else nothing."""

    def denoise_image(self, noisy_latents, t_image, context):
        number, contexts = self.numbers(self.latents) % 5, self.inner.encode_text(KINDS)[0]
        named = (context[:, None] - contexts[None]).flatten(2).norm(dim=2).argmin(dim=1)
        return torch.where((named == number)[:, None, None, None], self.target, 0.0)


@pytest.mark.parametrize("kind", ["diffdis", "clip", "drawer"])
def test_zeroshot_of_a_perfect_model_and_its_controls(base, monkeypatch, kind: str) -> None:
    if kind == "clip":
        oracle = build(tiny_clip_config())
        oracle.__class__ = ClipOracle
    else:
        oracle = Oracle(base, KINDS) if kind == "diffdis" else DrawingOracle(base, TEXTS)

    def target(kind, x0, noise, a, s):       # the drawer sees what the loss will compare its answer with
        oracle.latents, oracle.target = x0, noise
        return noise
    monkeypatch.setattr(evaluate, "make_target", target)
    options = {"loss_timesteps": 2} if kind == "drawer" else {}
    result = evaluate.zeroshot(oracle, Numbered(200), Reading(batch_size=70), **options)
    assert result["top1"] == result["mean_per_class"] == result["top5"] == 1.0 and result["n"] == 200
    for control in CONTROLS:
        broken = Reading(batch_size=70, control=control)
        result = evaluate.zeroshot(oracle, Numbered(200), broken, **options)
        low, high = result["top1_interval"]
        assert low - 0.03 <= result["chance"] <= high + 0.03, control


def test_one_class_is_refused(base) -> None:
    single = Numbered(10)
    single.classes = ["kind0"]
    with pytest.raises(ValueError, match="needs two"):
        evaluate.zeroshot(base, single)


def test_a_model_that_copies_its_noised_input_is_at_chance(base) -> None:
    """The noised query or latents must hold nothing of the answer."""
    copying = Oracle(base, TEXTS, copies=True)
    assert evaluate.retrieval(copying, Numbered(100))["i2t_r1"] <= 0.06
    for timesteps in (None, 2):
        result = evaluate.zeroshot(copying, Numbered(200), Reading(batch_size=1000), loss_timesteps=timesteps)
        assert result["top1_interval"][0] <= result["chance"] + 0.03


def test_no_text_of_the_answer_can_reach_the_prediction(base) -> None:
    assert not {"label", "labels", "target", "answer", "y"} & set(inspect.signature(score).parameters)
    for reads in (base.denoise_query, denoise_queries, draw_queries):
        assert not {"context", "text", "texts", "captions"} & set(inspect.signature(reads).parameters)
    # Changing the candidates changes no query.
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    a = score(base, images, ["a red circle", "a blue square"])
    b = score(base, images, ["a red circle", "a white cross", "a blue square"])
    assert torch.allclose(a, b[:, [0, 2]], atol=1e-6)


def test_numbers_that_are_not_finite_are_an_error_in_every_task(base) -> None:
    images, texts, black, few = Oracle(base, TEXTS), Oracle(base, TEXTS), build(), Numbered(9)
    images.queries = images.queries * math.nan
    texts.encode_text = lambda names: (None, torch.full((len(names), 32), math.nan))
    with torch.no_grad():
        black.unet.conv_out.weight.fill_(math.nan)
    for fails in (lambda: evaluate.retrieval(images, few), lambda: evaluate.zeroshot(images, few),
                  lambda: evaluate.retrieval(texts, few), lambda: evaluate.checker(black, 2, steps=2),
                  lambda: evaluate.zeroshot(black, few, loss_timesteps=1),
                  lambda: evaluate.fid(black, Shapes("val"), base, Reading(batch_size=2), n=2, steps=2)):
        with pytest.raises(ValueError, match="not finite"):
            fails()


def test_shuffled_images_show_a_leak(base, monkeypatch) -> None:
    """A model that is handed the answer by its place scores on whatever image: the control must show that."""
    monkeypatch.setattr(evaluate, "draw_queries", lambda model, latents, indices, *_: base.encode_text(
        [f"picture {i}" for i in indices])[1])
    for control in ("none", "shuffle-images", "no-image"):
        result = evaluate.retrieval(base, Numbered(50), Reading(control=control))
        assert result["i2t_r1"] == 1.0, f"{control}: a leak would go unseen"


def test_retrieval_takes_any_caption_and_any_image_of_a_caption(base) -> None:
    class Twins(Numbered):      # pictures 2k and 2k+1 share their first caption, but for spaces and case
        def captions(self, index: int) -> list[str]:
            k = self.rows[index]
            return [("picture {}", " Picture  {}")[k % 2].format(k // 2 * 2), f"image {k}"]
    oracle = Oracle(base, [f"picture {i // 2 * 2}" for i in range(20)])
    result = evaluate.retrieval(oracle, Twins(20))
    assert result["n_texts"] == 30 and result["i2t_r1"] == 1.0, "a text of two images is right for both"
    assert result["chance"] == pytest.approx(2 / 30) and result["t2i_r1"] == pytest.approx(10 / 30, abs=0.1)
    hits = evaluate.retrieval(Oracle(base, [f"image {i}" for i in range(20)]), Twins(20))
    assert hits["i2t_r1"] == 1.0, "any of an image's captions counts"


def test_zeroshot_equals_a_slow_reference(base) -> None:
    """A class is the normalised mean of its templates; classes of unequal size count alike in their mean."""
    seven, oracle = Numbered(35), Oracle(base, TEXTS)
    generator = torch.Generator().manual_seed(0)
    texts, oracle.queries = (F.normalize(torch.randn(n, 32, generator=generator), dim=-1) for n in (14, 35))
    texts[1] = -0.9 * texts[0] + 0.1 * texts[1]          # the first class's mean is short, and yet
    oracle.queries[0] = F.normalize(texts[0] + texts[1], dim=0)
    seven.classes, seven.labels = [f"kind{k}" for k in range(7)], [i % 7 if i < 28 else 6 for i in range(35)]
    prompts = [f"{article} kind{k}" for k in range(7) for article in ("a", "the")]
    oracle.encode_text = lambda names: (None, texts[[prompts.index(name) for name in names]])
    classes = [F.normalize(texts[2 * k] + texts[2 * k + 1], dim=0) for k in range(7)]
    order = [sorted(range(7), key=lambda k: -float(query @ classes[k])) for query in oracle.queries]
    hits = [order[i][0] == seven.labels[i] for i in range(35)]
    found = evaluate.zeroshot(oracle, seven, templates=["a {}", "the {}"])
    assert found["top1"] == pytest.approx(np.mean(hits)) and any(hits)
    assert found["top5"] == pytest.approx(np.mean([seven.labels[i] in order[i][:5] for i in range(35)]))
    rates = [np.mean([hits[i] for i in range(35) if seven.labels[i] == k]) for k in range(7)]
    assert found["mean_per_class"] == pytest.approx(np.mean(rates)) != pytest.approx(found["top1"])


def test_the_checker_judges_the_models_own_favourite(base, monkeypatch) -> None:
    """Of two pictures the second is right, and the one that the model chooses."""
    val = Shapes("val")
    right = [torch.from_numpy(np.array(val.read(i).image)).permute(2, 0, 1) / 127.5 - 1 for i in range(3)]
    monkeypatch.setattr(sample, "draw_images", lambda model, prompts, seeds, *_, **__: torch.stack(
        [right[seed // 2] if seed % 2 else torch.zeros(3, 32, 32) for seed in seeds]))
    seen = []
    monkeypatch.setattr(sample, "score", lambda model, images, texts, draws, seed, indices:
                        seen.append((texts, indices)) or torch.tensor([0.1, 0.2] * 3).diag())
    found = evaluate.checker(base, n=3, steps=2, best_of=2)
    assert found["all"] == 1.0 and found["n"] == 3
    assert seen == [([val.captions(i)[0] for i in range(3) for _ in range(2)], [0] * 6)]


def test_ranks_equal_a_slow_reference_and_ties_count_against_the_model() -> None:
    torch.manual_seed(0)
    queries, candidates = torch.randn(23, 4), torch.randn(11, 4)
    matches = [sorted({i % 11, (i * 3) % 11}) for i in range(23)]
    slow = []
    for i, right in enumerate(matches):
        order = sorted(range(11), key=lambda j: -(queries[i] @ candidates[j]))
        slow.append(min(order.index(j) for j in right))
    pairs = torch.tensor([(i, j) for i, right in enumerate(matches) for j in right])
    assert ranks_of_best_match(queries, candidates, pairs, block=5).tolist() == slow
    same, pairs = torch.ones(4, 8), torch.arange(4)[:, None].expand(4, 2)
    assert (ranks_of_best_match(same, same, pairs) == 3).all(), "a constant model would look perfect"


def test_wilson() -> None:
    low, high = wilson(0.5, 100)
    assert abs(low - 0.4038) < 1e-4 and abs(high - 0.5962) < 1e-4
    assert wilson(0.0, 10)[0] == pytest.approx(0, abs=1e-12) and wilson(1.0, 10)[1] == pytest.approx(1)


def test_templates(base) -> None:
    assert fill("a photo of {a} {}", "owl") == "a photo of an owl" and fill("{a} {}", "dog") == "a dog"
    assert fill("a {}", "owl") == "a owl", "without {a} a user's template stays as it is"
    for source, given, used in ((Numbered(5), None, ["a photo of {a} {}"]),
                                (evenly_spaced(Shapes("classes"), 5), None, ["a {}"]),
                                (Numbered(5), ["my {}", "{}"], ["my {}", "{}"])):
        assert evaluate.zeroshot(base, source, templates=given)["templates"] == used


def test_command_line_writes_what_the_contract_names(base, tmp_path, capsys) -> None:
    models.save(tmp_path / "c.pt", base)
    flags = ["--ckpt", str(tmp_path / "c.pt"), "--limit", "48", "--json", str(tmp_path / "r.json"),
             "--device", "cpu"]
    evaluate.main(["retrieval", *flags])
    alone = json.loads((tmp_path / "r.json").read_text())
    evaluate.main([*flags, "--n", "4", "--steps", "2", "retrieval", "zeroshot", "checker"])
    results = json.loads((tmp_path / "r.json").read_text())
    assert {**alone, "settings": 0} == {**results["retrieval"], "settings": 0}, "several are each task alone"
    for task, n, names in (("retrieval", 48, "i2t_r1 i2t_r5 i2t_r10 t2i_r1 t2i_r5 t2i_r10"),
                           ("zeroshot", 48, "top1 top5 mean_per_class"),
                           ("checker", 4, "colour shape size relation all")):
        result = results.pop(task)
        assert result["task"] == task and result["n"] == n and result["seed"] == 0 and result["chance"] >= 0
        assert result["checkpoint"] == str(tmp_path / "c.pt") and result["settings"]["text_steps"] == 1
        assert all(0 <= result[name] <= 1 for name in names.split())
    said = capsys.readouterr().out
    assert not results and "retrieval on shapes, seed 0  (n = 48)" in said and "95 % interval" in said


@pytest.mark.parametrize("flags, message", [
    (["retrieval", "--ckpt", "none.pt"], "no checkpoint"), (["retrieval", "--data", "nowhere"], "no data"),
    (["retrieval"], "train.py"),
    (["retrieval", "fid"], "trained with --tasks generation"), (["checker", "--best-of", "2"], "alignment"),
    (["zeroshot", "--loss-timesteps", "2"], "generation"), (["knn"], "knn"),
    (["zeroshot", "--template", "a photo"], "for the name of a class"),
    (["retrieval", "--json", "no/r.json"], "existing folder"),
    (["fid", "--features", "none.pt"], "none.pt"), (["fid", "--features", "large.pt"], "pictures of 32 px"),
    (["fid", "--features", "c.pt", "--limit", "9", "--n", "1", "--steps", "2"], "two or more"),
    (["retrieval", "--text-steps", "2000"], "is 2000, expected 1 to 1000")])
def test_mistakes_end_in_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, message) -> None:
    monkeypatch.chdir(tmp_path)
    model = build()
    model.tasks = ("alignment",) if "--loss-timesteps" in flags or flags == ["retrieval", "fid"] else (
        ("generation",) if "--best-of" in flags else model.tasks)
    models.save("c.pt", model)
    models.save("large.pt", build(tiny_config(image_size=64)))
    given = [] if "--ckpt" in flags or flags == ["retrieval"] else ["--ckpt", "c.pt"]
    assert message in error_of(capsys, evaluate.main, [*flags, *given, "--device", "cpu"])


@torch.no_grad()
@pytest.mark.parametrize("target", ["noise", "v"])
def test_denoising_errors_equal_a_slow_reference(target: str) -> None:
    """One image and one timestep at a time."""
    model = build(tiny_config(image_target=target))
    contexts = torch.randn(3, 24, 32, generator=torch.Generator().manual_seed(0)) * 30
    latents = torch.randn(3, 192, 4, 4, generator=torch.Generator().manual_seed(1))
    found = evaluate.denoising_errors(model, latents, [7, 8, 11], contexts, 5, seed=3)
    assert found.shape == (3,) and found.dtype == torch.float64
    alphas = make_alphas_cumprod("linear", 1000)
    for z, context, place, error in zip(latents.split(1), contexts.split(1), (7, 8, 11), found):
        def loss(j: int) -> float:
            t = torch.tensor([100 + 200 * j])
            noise = torch.randn(1, 192, 4, 4, generator=generator_of(3, place, j))
            a, s = alphas[t].sqrt().float(), (1 - alphas[t]).sqrt().float()
            aim = noise if target == "noise" else a * noise - s * z
            return ((model.denoise_image(a * z + s * noise, t, context) - aim) ** 2).mean().item()
        assert error.item() == pytest.approx(np.mean([loss(j) for j in range(5)]), abs=1e-5)


def test_each_image_and_each_text_is_encoded_once(base, monkeypatch) -> None:
    seen: Counter = Counter()
    for name in ("encode_text", "read_batch"):
        def count(self, what, *rest, original=getattr(models.DiffDis, name), name=name):
            seen[name] += len(what)
            return original(self, what, *rest)
        monkeypatch.setattr(models.DiffDis, name, count)
    evaluate.zeroshot(base, Numbered(60), Reading(batch_size=7))
    assert seen == {"encode_text": 5, "read_batch": 60}, "N images and K classes, not N times K"


def test_separate_captions_are_separate_texts(base) -> None:
    class Karpathy(Numbered):
        captions = Source.captions
    karpathy = Karpathy(20)
    karpathy.texts = [["the same"] + [f"picture {i}"] * 2 for i in range(20)]
    result = evaluate.retrieval(Oracle(base, TEXTS), karpathy)
    assert result["n_texts"] == 60 and result["i2t_r1"] == 1.0
    assert result["t2i_r1"] < 1 and result["chance"] == pytest.approx(1 / 20)
    assert result["mean_r1"] == pytest.approx((result["i2t_r1"] + result["t2i_r1"]) / 2)


class Broken(Numbered):
    def read(self, index: int, side: int | None = None):
        if self.rows[index] in (4, 9):
            raise BadSample("unreadable image")
        return super().read(index)


def measure(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/{world}", rank=rank, world_size=world)
    readings = [Reading(draws=2, control=name, batch_size=4, max_bad=0.5) for name in evaluate.CONTROLS]
    found = [task(build(), Broken(23), reading, **options) for reading in readings for task, options in (
        (evaluate.retrieval, {}), (evaluate.zeroshot, {}), (evaluate.zeroshot, {"loss_timesteps": 2}))]
    if rank == 0:
        (folder / f"{world}.json").write_text(json.dumps(found))


def test_any_number_of_ranks_gives_the_same_scores(tmp_path) -> None:
    for world in (1, 2, 3):
        torch.multiprocessing.start_processes(measure, (world, tmp_path), world, start_method="fork")
    alone, two, three = (json.loads((tmp_path / f"{world}.json").read_text()) for world in (1, 2, 3))
    assert alone == two == three
    assert alone[0]["n"] == 21 and alone[0]["skipped"]["skipped"] == {"unreadable image": 2}


def test_flags_of_tasks_that_were_not_asked_for_are_said() -> None:
    with pytest.warns(UserWarning, match="--best-of is for checker: it changes nothing here"):
        evaluate.parse_args(["retrieval", "--best-of", "2"])
    with pytest.warns(UserWarning, match="--control is for retrieval, zeroshot, longtail: it changes"):
        evaluate.parse_args(["fid", "checker", "--control", "no-image"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate.parse_args(["retrieval", "checker", "--best-of", "2", "--draws", "3"])
