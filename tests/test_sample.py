"""Drawing: an image depends on its prompt and seed alone. Reading: a picture against texts. Mistakes end in
one line."""
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, build, error_of, tiny_clip_config, tiny_config
from PIL import Image
from torch.nn import functional as F

import model as models
import sample
from data import evaluation_batches
from diffusion import make_alphas_cumprod, noise_of
from sample import draw_images, draw_queries, load_image, make_grid, score


def test_an_image_does_not_depend_on_its_batch(base) -> None:
    prompts = ["a red circle", "a blue square", "a white cross"]
    together = draw_images(base, prompts, [5, 6, 7], steps=4)
    assert together.shape == (3, 3, 32, 32) and together.abs().max() <= 1
    for i, prompt in enumerate(prompts):
        alone = draw_images(base, [prompt], [5 + i], steps=4)
        assert torch.allclose(together[i], alone[0], atol=1e-4), \
            "image k of a seed must not depend on the batch"
    for changes in ({"seeds": [6]}, {"sampler": "dpm++"}):
        other, = draw_images(base, prompts[:1], **{"seeds": [5], "steps": 4, **changes})
        assert (other - together[0]).abs().max() > 1e-3, f"{changes} changes nothing"


def test_guidance_extrapolates_from_the_negative_to_the_prompt(monkeypatch) -> None:
    """With a network that says one number per context, what comes out can be written down."""
    model, passes = build(tiny_config(image_target="data", guidance_scale=4.0)), []
    monkeypatch.setattr(type(model), "denoise_image", lambda self, z, t, context: passes.append(len(z)) or
                        0.1 * context[:, 3].mean(dim=1)[:, None, None, None].expand_as(z))
    negative, prompt = model.encode_text(["a blue square", "a red circle"])[0][:, 3].mean(dim=1)
    assert abs(prompt - negative) > 1e-3, "else every scale would draw the same"
    for given, scale in ((2.5, 2.5), (None, 4.0), (1, 1)):           # without one the checkpoint's own
        expected = 0.1 * (negative + scale * (prompt - negative)) / model.config.autoencoder.scale
        image = draw_images(model, ["a red circle"], [1], 3, given, negative="a blue square")
        assert torch.allclose(image, expected.expand_as(image), atol=1e-5), given
    assert passes == [2] * 6 + [1] * 3, "a scale of one needs no second pass"


@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_queries_follow_algorithm_3(monkeypatch, gamma: float) -> None:
    """Guided from the zeroed latent, on the text's schedule, with new noise for each draw; then the mean."""
    model, seen = build(tiny_config(gamma=gamma)), []
    *answers, nothing = torch.eye(32)[:3].split(1)

    def network(self, e_t, t, latents, null):
        seen.append((e_t, int(t)))
        return answers[(len(seen) - 1) // 4] if latents.any() else nothing        # a draw is four passes
    monkeypatch.setattr(type(model.unet), "denoise_query", network)
    query = draw_queries(model, torch.ones(1, 192, 4, 4), [0], steps=2, draws=2, guidance_scale=3.0)
    expected, other = (F.normalize(3 * answer - 2 * nothing, dim=-1) for answer in answers)
    assert torch.allclose(query, F.normalize(expected + other, dim=-1), atol=1e-5)
    starts, alphas = [e_t for e_t, t in seen if t == 999], make_alphas_cumprod("cosine", 1000).float()
    noise = (starts[0] - gamma * alphas[999].sqrt() * expected) / (1 - alphas[999]).sqrt()
    after = gamma * alphas[499].sqrt() * expected + (1 - alphas[499]).sqrt() * noise
    assert torch.allclose(seen[2][0], after, atol=1e-4), "the step from 999 to 499 is not DDIM's"
    assert len(starts) == 4 and torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_a_noise_predicting_model_stops_where_stable_diffusion_stops(monkeypatch) -> None:
    """At the first alpha (diffusers' set_alpha_to_one=False), not at 1."""
    model, alphas = build(tiny_config(image_target="noise")), make_alphas_cumprod("linear", 1000).float()
    monkeypatch.setattr(type(model), "denoise_image", lambda self, z, t, context: torch.ones_like(z))
    x0 = (noise_of((192, 4, 4), [(3,)]) - (1 - alphas[1]).sqrt()) / alphas[1].sqrt()
    expected = model.decode_image(alphas[0].sqrt() * x0 + (1 - alphas[0]).sqrt()).clamp(-1, 1)
    for sampler, picture in (("ddim", expected), ("dpm++", model.decode_image(x0).clamp(-1, 1))):
        image = draw_images(model, ["a red circle"], [3], steps=1, guidance_scale=1, sampler=sampler)
        assert torch.allclose(image, picture, atol=1e-4), sampler
    assert (expected - picture).abs().max() > 1e-3


def test_the_condition_is_the_empty_prompt_encoded_once(base, monkeypatch) -> None:
    empty, calls, conditions = base.encode_text([""])[0], [], []
    base.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(type(base.unet), "denoise_query", lambda self, e_t, t, latents, null:
                        conditions.append(null) or torch.ones_like(e_t))
    draw_queries(base, torch.randn(2, 192, 4, 4), [0, 1], steps=3, guidance_scale=2.0)
    assert len(calls) == 1 and len(conditions) == 6
    assert all(torch.equal(condition, empty) for condition in conditions)
    assert sample.denoise_queries.__annotations__.keys() == {
        "model", "latents", "noise", "steps", "guidance_scale", "return"}, "no text may enter"


def test_queries_depend_on_the_image_index_not_on_the_batch(base) -> None:
    latents = torch.randn(4, 192, 4, 4)
    together = draw_queries(base, latents, [0, 1, 2, 3], steps=2, draws=2)
    alone = draw_queries(base, latents[2:3], [2], steps=2, draws=2)
    assert torch.allclose(together[2:3], alone, atol=1e-5)
    other = draw_queries(base, latents[2:3], [2], steps=2, draws=2, seed=1)
    assert not torch.equal(alone, other), "the seed changes nothing"


def test_best_of_keeps_the_highest_similarity(base, monkeypatch) -> None:
    read = base.encode_text(["a white cross", "a blue square", "a red circle", "a"])[1]
    given = []
    monkeypatch.setattr(sample, "draw_queries", lambda model, latents, indices, *rest:
                        given.append((set(indices), rest[-1])) or read[torch.arange(len(indices)) % 4])
    similarities = score(base, torch.zeros(4, 3, 32, 32), ["a red circle", "a white cross"])
    assert similarities.argmax(dim=0).tolist() == [2, 0] and similarities.shape == (4, 2)
    prompts = ["a red circle"] * 4 + ["a blue square"] * 4
    images, notes = sample.draw_all(base, prompts, [7, 8, 9, 10] * 2, best_of=4, steps=2)
    assert [note["seed"] for note in notes] == [9, 8]
    sample.draw_all(base, ["a red circle"] * 66, [5, 1, 2] * 22, best_of=3, steps=1)       # 64 at once
    assert given[1:] == [({0}, 7), ({0}, 5), ({0}, 5)], "noise is the first seed's own, for every picture"
    for image, note in zip(images, notes, strict=True):
        again = draw_images(base, [note["prompt"]], [note["seed"]], steps=2)[0]
        assert torch.allclose(image, again, atol=1e-4), "the picture is not the one its note names"


def test_a_killed_worker_ends_the_program_in_one_line(capsys) -> None:
    deadly = type("Deadly", (list,), {"__getitem__": lambda self, place: os.kill(os.getpid(), 9)})([0])
    with pytest.raises(RuntimeError, match="our own fault"), sample.errors_in_one_line():
        raise RuntimeError("our own fault")
    with pytest.raises(SystemExit, match="^2$"), sample.errors_in_one_line():
        batches = iter(evaluation_batches(deadly, 16, 1, workers=1))
        time.sleep(60)       # busy elsewhere: torch tells of the death in the midst of it
        next(batches)
    assert capsys.readouterr().err.startswith("error: DataLoader worker")
    assert "allocate memory" in error_of(capsys, sample.errors_in_one_line()(torch.empty), 2 ** 45)


def test_a_full_disk_leaves_the_old_picture(base, tmp_path, capsys) -> None:
    models.save(tmp_path / "c.pt", base)
    (tmp_path / "keep.png").write_bytes(b"precious")
    (tmp_path / "keep.png.part").symlink_to("/dev/full")     # what is written goes there first, and fails
    argv = ["a red circle", "--ckpt", str(tmp_path / "c.pt"), "--steps", "1", "--device", "cpu"]
    assert "No space" in error_of(capsys, sample.main, [*argv, "--out", str(tmp_path / "keep.png")])
    assert not (tmp_path / "keep.png").is_symlink(), "the half-written file took its place"
    assert (tmp_path / "keep.png").read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pt", "keep.png"]


def test_grid_places_every_picture() -> None:
    images = torch.stack([torch.full((3, 4, 4), v) for v in (-1.0, 0.0, 1.0)])
    grid = make_grid(images, columns=2, scale=3, gap=2)
    assert grid.size == (2 * 14 + 2, 2 * 14 + 2)
    assert grid.getpixel((8, 8)) == (0, 0, 0) and grid.getpixel((8, 22)) == (255, 255, 255)


def test_command_line(base, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    models.save(run / "checkpoint.pt", base)
    sample.main(["a red circle", "a dog outdoors", "-n", "2", "--best-of", "2", "--steps", "2", "--seed", "1",
                 "--device", "cpu"])
    said = capsys.readouterr()
    picture = Image.open(tmp_path / "sample.png")
    assert picture.size == (2 * 258 + 2, 2 * 258 + 2)
    first = re.search(r"prompt: a red circle  seed: (\d)", said.out)[1]
    assert f"Seed: {first}, " in picture.text["parameters"], "of the one that was kept"
    assert said.err.count("warning") == 1 and "'a dog outdoors' is not in the grammar" in said.err
    assert ("runs/one/checkpoint.pt" in said.out and "sample.png" in said.out
            and said.out.count("similarity") == 4)
    flags = ["a red circle", "--steps", "1", "--device", "cpu", "--size", "64", "32", "--out"]
    for name, more in (("plain.png", []), ("negative.png", ["--negative", "a blue square"])):
        sample.main([*flags, name, *more])
    plain, negative = map(Image.open, ("plain.png", "negative.png"))
    assert plain.size == (256, 128) and plain.tobytes() != negative.tobytes()
    assert negative.text["parameters"] == (
        "a red circle\nNegative prompt: a blue square\nSteps: 1, Sampler: DDIM, CFG scale: "
        f"{base.config.guidance_scale}, Seed: 0, Size: 64x32, Model: checkpoint")
    # Too long: cut; empty: allowed.
    sample.main([" ".join(["red"] * 99), "", "--steps", "1", "--device", "cpu"])


@pytest.mark.parametrize("config", [tiny_config(), tiny_clip_config()], ids=["DiffDis", "CLIP"])
def test_pictures_are_read_against_texts(config, tmp_path, monkeypatch, capsys) -> None:
    """Of any mode, rotation and format; the numbers are those of `score` and the model's own temperature."""
    monkeypatch.chdir(tmp_path)
    model, texts = build(config), ["a red circle", "a blue square", "caf\u00e9"]
    models.save("c.pt", model)
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x112] = 6                                              # to be shown turned by 90 degrees clockwise
    turned.save("turned.png", exif=exif)
    upright.save("lossless.webp", lossless=True)
    upright.convert("LA").save("grey.png")
    files = ["turned.png", "lossless.webp", "grey.png"]
    sample.main([*sum((["--image", file] for file in files), []), *texts, "--ckpt", "c.pt", "--seed", "3",
                 "--json", "read.json", "--device", "cpu"])
    said, found = capsys.readouterr().out, json.loads((tmp_path / "read.json").read_text())
    assert found["n"] == 3 and found["texts"] == texts and found["chance"] == pytest.approx(1 / 3)
    for note, file in zip(found["images"], files, strict=True):
        cosines = score(model, load_image(file, 32), texts, draws=4, seed=3)[0]
        assert note["image"] == file and note["cosines"] == pytest.approx(cosines.tolist(), abs=1e-5)
        odds = F.softmax(cosines * model.logit_scale.exp(), dim=0)
        assert note["probabilities"] == pytest.approx(odds.tolist(), abs=1e-5)
        ranked = re.findall(rf"([\d.]+) % +(-?[\d.]+)  (.*), {re.escape(file)}\n", said)
        assert [text for *_, text in ranked] == [texts[k] for k in cosines.argsort(descending=True)]
        assert float(ranked[0][0]) == pytest.approx(100 * odds.max().item(), abs=0.06)
    first, second, _ = (note["cosines"] for note in found["images"])
    assert first == pytest.approx(second, abs=1e-6), "not upright"
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save("clear.png")
    assert load_image("clear.png", 32).min() == 1, "what is transparent is white"


def test_the_six_lines_of_the_readme(base, tmp_path, monkeypatch, capsys) -> None:
    lines, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/shapes-tiny").mkdir(parents=True)
    models.save("runs/shapes-tiny/checkpoint.pt", base)
    exec(lines, {})
    assert len(lines.splitlines()) == 6 and capsys.readouterr().out.startswith("tensor([[")
    assert Image.open("drawn.png").size == (32, 32)


def test_a_terminal_without_the_letters_loses_nothing(base, tmp_path) -> None:
    models.save(tmp_path / "c.pt", base)
    (tmp_path / "\u732b").mkdir()
    command = "sample.py \u732b --steps 1 --out \u732b/x.png --json \u732b/x.json --ckpt c.pt --device cpu"
    done = subprocess.run([sys.executable, *f"{ROOT}/{command}".split()], cwd=tmp_path, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "cp437"})
    assert done.returncode == 0 and b"\\u732b" in done.stdout, done.stderr
    assert sorted(path.name for path in (tmp_path / "\u732b").iterdir()) == ["x.json", "x.png"]


@pytest.mark.parametrize("flags, message", [
    ("--ckpt x.pt", "no checkpoint"), ("--out x.jpg", ".png"), ("--out no/where.png", "existing folder"),
    ("--size 33 32", "multiples of 8"), ("--size 64", "--size"), ("--size 8 1600000", "4096"),
    ("--steps 2000", "1 to 1000"), ("--device cuda", "CUDA"), ("--seed -1", "--seed"),
    ("--guidance-scale nan", "--guidance-scale"), ("--json no/where.json", "existing folder"),
    ("--image gone.png", "gone.png"), ("--image c.pt", "c.pt cannot be used: BadSample: unreadable image"),
    *((f"--image x.png {flag}", "is for drawing") for flag in (
        "-n 2", "--best-of 4", "--out y.png", "--sampler dpm++", "--steps 9", "--guidance-scale 1",
        "--negative x", "--size 32 32")),
    ("--image c.pt c.pt", "not a text"), ("--image c.pt --ckpt draws.pt", "--tasks alignment"),
    ("--ckpt clip.pt", "--tasks generation"), ("--best-of 2 --ckpt draws.pt", "train.py --init")])
def test_mistakes_end_in_one_line_and_status_2(base, tmp_path, monkeypatch, capsys, flags, message) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    models.save("c.pt", base)
    if "clip" in flags or "draws" in flags:
        models.save("clip.pt", build(tiny_clip_config()))
        only = build()
        only.tasks = ("generation",)
        models.save("draws.pt", only)
    argv = ["--device", "cpu", "--ckpt", "c.pt", *flags.split(), "a red circle"]
    assert message in error_of(capsys, sample.main, argv)
