"""Scores against slow references, and the mistakes an evaluation of this model must not make."""
import hashlib
import inspect
import json
import math
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, build, tiny_clip_config, tiny_config
from PIL import Image
from torch.nn import functional as F

import evaluate
import model as models
from data import Shapes, Source, evenly_spaced, usable_captions
from diffusion import generator_of, make_alphas_cumprod
from evaluate import chance_of_hit, fill, parse_args, ranks_of_best_match, score, wilson
from sample import draw_queries


class Oracle(torch.nn.Module):
    """Stands in for a perfect model: reads a picture's number from its first pixel
    and knows that text's query.

    `copies` makes it the opposite: it returns the noised query it was given,
    so it can only repeat what is fed in.
    """

    def __init__(self, model, texts: list[str], copies: bool = False) -> None:
        super().__init__()
        self.inner, self.copies = model, copies
        self.config, self.device, self.tokenizer = model.config, model.device, model.tokenizer
        self.queries = model.encode_text(texts)[1]
        self.encode_text, self.encode_image = model.encode_text, model.encode_image
        self.read_batch = model.read_batch

    def denoise_query(self, noisy_query, t_text, latents):
        if self.copies:
            return noisy_query
        number = ((self.inner.decode_image(latents)[:, 0, 0, 0] + 1) * 127.5).round().long()
        return self.queries[number.clamp(0, len(self.queries) - 1)]


class Numbered(Source):
    """Picture i has colour i; it has two captions of its own, and label i % 5."""

    def __init__(self, count: int, prefix: str = "") -> None:
        super().__init__("numbered", count)
        self.prefix, self.classes = prefix, [f"kind{k}" for k in range(5)]
        self.labels = [i % 5 for i in range(count)]

    def key(self, index: int) -> str:
        return f"{self.prefix}{self.rows[index]}"

    def captions(self, index: int) -> list[str]:
        return [f"picture {self.rows[index]}", f"image {self.rows[index]}"]

    def image(self, index: int, side: int | None = None) -> Image.Image:
        return Image.fromarray(np.full((32, 32, 3), self.rows[index], np.uint8))


TEXTS = [f"picture {i}" for i in range(100)]


def run(task, model, source, *flags: str) -> dict:
    args = parse_args([task.__name__, *flags])
    return task(model, args) if source is None else task(model, source, args)


@pytest.fixture(scope="module")
def base():
    return build()


def test_a_perfect_model_scores_perfectly_and_every_control_is_chance(base) -> None:
    oracle, source = Oracle(base, TEXTS), Numbered(100)
    assert run(evaluate.retrieval, oracle, source)["i2t_r1"] == 1.0
    for control in ("shuffle-images", "no-image", "shuffle-labels"):
        result = run(evaluate.retrieval, oracle, source, "--control", control)
        assert abs(result["chance"] - 0.01) < 1e-9       # 2 of 200 texts are right
        for name in ("i2t_r1", "t2i_r1"):
            assert result[f"{name}_interval"][0] <= result[f"{name}_chance"] + 0.02, \
                f"{control}: {name} is above chance"
            assert result[name] <= 0.06


def test_zeroshot_counts_and_controls(base) -> None:
    class Classes(Oracle):
        def denoise_query(self, noisy_query, t_text, latents):
            number = ((self.inner.decode_image(latents)[:, 0, 0, 0] + 1) * 127.5).round().long()
            return self.inner.encode_text([f"a photo of a kind{k}" for k in range(5)])[1][number % 5]
    oracle, source = Classes(base, TEXTS), Numbered(200)
    result = run(evaluate.zeroshot, oracle, source)
    assert (result["top1"] == result["mean_per_class"] == 1.0
            and result["top5"] == 1.0 and result["chance"] == 0.2)
    for control in ("shuffle-images", "no-image", "shuffle-labels"):
        result = run(evaluate.zeroshot, oracle, source, "--control", control)
        low, high = result["top1_interval"]
        assert low - 0.03 <= 0.2 <= high + 0.03, f"{control} is not at chance: {result['top1']}"


def test_a_model_that_copies_its_noised_input_is_at_chance(base) -> None:
    result = run(evaluate.retrieval, Oracle(base, TEXTS, copies=True), Numbered(100))
    assert result["i2t_r1"] <= 0.06, "the noised query must hold nothing of the answer at test time"


def test_no_text_of_the_answer_can_reach_the_prediction(base, monkeypatch) -> None:
    assert not {"label", "labels", "target", "answer", "y"} & set(inspect.signature(score).parameters)
    assert "context" not in inspect.signature(base.denoise_query).parameters
    assert not {"text", "texts", "caption", "captions"} & set(inspect.signature(draw_queries).parameters)
    # The texts encoded on the way to the prediction: only the null prompt.
    # Changing the candidates changes no query.
    seen = []
    original = type(base.text_encoder).forward
    monkeypatch.setattr(type(base.text_encoder), "forward",
                        lambda self, tokens: (seen.append(tokens), original(self, tokens))[1])
    draw_queries(base, torch.randn(2, 192, 4, 4), [0, 1])
    assert all(torch.equal(tokens, base.null_tokens) for tokens in seen)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    a = score(base, images, ["a red circle", "a blue square"])
    b = score(base, images, ["a red circle", "a white cross", "a blue square"])
    assert torch.allclose(a, b[:, [0, 2]], atol=1e-6)


def test_a_constant_model_does_not_look_perfect() -> None:
    same = torch.ones(4, 8)
    assert (ranks_of_best_match(same, same, [[0], [1], [2], [3]]) == 3).all(), \
        "ties must count against the model"


def test_numbers_that_are_not_finite_are_no_hits(base) -> None:
    nothing = torch.full((4, 8), math.nan)
    assert (ranks_of_best_match(nothing, torch.ones(4, 8), [[0], [1], [2], [3]]) == 3).all()
    broken = Oracle(base, TEXTS)
    broken.queries = broken.queries * math.nan
    for task in (evaluate.retrieval, evaluate.zeroshot):
        with pytest.raises(ValueError, match="not finite"):
            run(task, broken, Numbered(20))


def test_shuffled_images_show_a_leak(base, monkeypatch) -> None:
    """A model that is handed the answer by its place scores on whatever image: the control must show that."""
    monkeypatch.setattr(evaluate, "draw_queries", lambda model, latents, indices, *_: base.encode_text(
        [f"picture {i}" for i in indices])[1])
    for control in ("none", "shuffle-images", "no-image"):
        result = run(evaluate.retrieval, base, Numbered(50), "--control", control)
        assert result["i2t_r1"] == 1.0, f"{control}: a leak would go unseen"


def test_retrieval_takes_any_caption_and_any_image_of_a_caption(base) -> None:
    class Twins(Numbered):      # pictures 2k and 2k+1 share their first caption
        def captions(self, index: int) -> list[str]:
            return [f"picture {self.rows[index] // 2 * 2}", f"image {self.rows[index]}"]
    oracle = Oracle(base, [f"picture {i // 2 * 2}" for i in range(20)])
    result = run(evaluate.retrieval, oracle, Twins(20))
    assert result["n_texts"] == 30 and result["i2t_r1"] == 1.0, "a text of two images is right for both"
    assert result["t2i_r1_chance"] == pytest.approx((10 * 2 / 20 + 20 * 1 / 20) / 30)
    hits = run(evaluate.retrieval, Oracle(base, [f"image {i}" for i in range(20)]), Twins(20))
    assert hits["i2t_r1"] == 1.0, "any of an image's captions counts"


def test_class_means_differ_from_the_mean_where_classes_do(base) -> None:
    lopsided = Numbered(40)          # three in four are of kind 0, which is all the oracle ever says
    lopsided.labels = [int(i % 4 == 3) for i in range(40)]
    oracle = Oracle(base, ["a photo of a kind0"] * 100)
    result = run(evaluate.zeroshot, oracle, lopsided)
    assert result["top1"] == 0.75 and result["mean_per_class"] == 0.5


def test_a_class_is_the_mean_of_its_templates(base, tmp_path) -> None:
    (tmp_path / "t.txt").write_text("a photo of a {}\n{} on a beach\n")
    args = parse_args(["zeroshot", "--templates", str(tmp_path / "t.txt")])
    args.templates = evaluate.read_templates(args.templates)
    seen = base.encode_text([t.replace("{}", f"kind{k}") for k in range(5) for t in args.templates])[1]
    classes = F.normalize(seen.unflatten(0, (5, 2)).mean(dim=1), dim=-1)
    queries = F.normalize(torch.randn(40, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    oracle = Oracle(base, TEXTS)
    oracle.queries = queries
    expected = [(queries[i] @ classes.T).argmax().item() == i % 5 for i in range(40)]
    assert evaluate.zeroshot(oracle, Numbered(40), args)["top1"] == pytest.approx(sum(expected) / 40)


def test_a_limit_takes_samples_from_all_over() -> None:
    by_class = Numbered(100)
    by_class.labels = [i // 20 for i in range(100)]
    some = evenly_spaced(by_class, 10)
    assert [some.read(i).label for i in range(10)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_ranks_equal_a_slow_reference() -> None:
    torch.manual_seed(0)
    queries, candidates = torch.randn(23, 4), torch.randn(11, 4)
    matches = [sorted({i % 11, (i * 3) % 11}) for i in range(23)]
    slow = []
    for i, right in enumerate(matches):
        order = sorted(range(11), key=lambda j: -(queries[i] @ candidates[j]))
        slow.append(min(order.index(j) for j in right))
    assert ranks_of_best_match(queries, candidates, matches, block=5).tolist() == slow


def test_wilson_and_chance() -> None:
    low, high = wilson(0.5, 100)
    assert abs(low - 0.4038) < 1e-4 and abs(high - 0.5962) < 1e-4
    assert wilson(0.0, 10)[0] == pytest.approx(0, abs=1e-12) and wilson(1.0, 10)[1] == pytest.approx(1)
    rng = np.random.default_rng(0)
    hits = [bool(set(rng.permutation(20)[:5]) & {0, 1}) for _ in range(20000)]
    assert abs(chance_of_hit(5, 20, 2) - np.mean(hits)) < 0.015
    assert chance_of_hit(10, 5, 1) == 1 and math.isclose(chance_of_hit(1, 500, 1), 0.002)


def test_templates(tmp_path) -> None:
    assert fill("a photo of a {}", "owl") == "a photo of an owl" and fill("the {}", "owl") == "the owl"
    assert fill("data {}, a {}", "owl") == "data owl, an owl" and fill("a {}", "dog") == "a dog"
    (tmp_path / "t.txt").write_text("no braces\n")
    with pytest.raises(ValueError, match="{}"):
        evaluate.read_templates(str(tmp_path / "t.txt"))


def test_scores_depend_on_seed_and_draws_and_stay_cosines(base) -> None:
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    a, again = score(base, images, TEXTS[:7]), score(base, images, TEXTS[:7])
    assert torch.equal(a, again) and a.shape == (4, 7) and a.abs().max() <= 1 + 1e-5
    assert not torch.equal(a, score(base, images, TEXTS[:7], seed=1))
    guided = score(base, images, TEXTS[:7], text_steps=5, draws=3, guidance_scale=2.0)
    assert guided.abs().max() <= 1 + 1e-5 and torch.isfinite(guided).all()


def test_command_line_writes_what_the_contract_names(base, tmp_path, capsys) -> None:
    models.save(tmp_path / "c.pt", base)
    for task, names in (("retrieval", ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")),
                        ("zeroshot", ("top1", "top5"))):
        evaluate.main([task, "--ckpt", str(tmp_path / "c.pt"), "--limit", "48",
                       "--json", str(tmp_path / "r.json"), "--device", "cpu"])
        result = json.loads((tmp_path / "r.json").read_text())
        assert (result["task"] == task and result["n"] == 48 and result["seed"] == 0
                and 0 < result["chance"] < 1)
        assert all(0 <= result[name] <= 1 for name in names)
        digest = hashlib.sha256((tmp_path / "c.pt").read_bytes()).hexdigest()
        assert digest.startswith(result["checkpoint_hash"]) and len(result[f"{names[0]}_interval"]) == 2
        assert result["settings"]["text_steps"] == 1 and result["seconds_per_image"] > 0
    assert "chance" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--ckpt", "none.pt"], "no checkpoint"), (["--data", "nowhere"], "no data"), ([], "train.py")])
def test_mistakes_end_in_one_line_and_status_2(base, tmp_path, monkeypatch, capsys, flags, message) -> None:
    monkeypatch.chdir(tmp_path)
    if "--data" in flags:
        models.save(tmp_path / "c.pt", base)
        flags = ["--ckpt", "c.pt", *flags]
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["retrieval", "--device", "cpu", *flags])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in error and "\n" not in error


# ---------------------------------------------------------------- every method, every control
class ClipOracle(models.Clip):
    """A perfect CLIP: it reads a picture's number from its first pixel and knows that text's embedding."""

    def encode_image(self, images):
        mean, std = (torch.tensor(v)[:, None, None] for v in (models.CLIP_MEAN, models.CLIP_STD))
        number = ((images * std + mean)[:, 0, 0, 0] * 255).round().long()
        return self.encode_text([f"a photo of a kind{k}" for k in range(5)])[1][number % 5]


class DrawingOracle(Oracle):
    """A perfect drawer: it knows the noise, if the context is that of the image's class, else nothing."""
    tasks = ("generation",)

    def denoise_image(self, noisy_latents, t_image, context):
        first = self.inner.decode_image(self.latents)[:, 0, 0, 0]
        number = ((first + 1) * 127.5).round().long() % 5
        contexts = self.inner.encode_text([f"a photo of a kind{k}" for k in range(5)])[0]
        named = (context[:, None] - contexts[None]).flatten(2).norm(dim=2).argmin(dim=1)
        each = len(named) // len(number)
        right = named == number.repeat_interleave(each)
        return torch.where(right[:, None, None, None], self.target.repeat_interleave(each, dim=0), 0.0)


def at_chance(result: dict, name: str = "top1") -> bool:
    low, high = result[f"{name}_interval"]
    return low - 0.03 <= result["chance"] <= high + 0.03


@pytest.fixture(scope="module")
def clip():
    made = build(tiny_clip_config())
    made.__class__ = ClipOracle
    return made


def test_clip_is_scored_as_diffdis_is_and_its_controls_are_chance(clip) -> None:
    result = run(evaluate.zeroshot, clip, Numbered(200))
    assert result["top1"] == 1.0 and result["n"] == 200
    for control in ("shuffle-images", "no-image", "shuffle-labels"):
        result = run(evaluate.zeroshot, clip, Numbered(200), "--control", control)
        assert at_chance(result), f"{control}: {result['top1']}"


def test_clip_sees_pixels_as_clip_wants_them() -> None:
    clip = build(tiny_clip_config())
    pixels = torch.tensor([[0, 128, 255]], dtype=torch.uint8).expand(1, 32, 32, 3)
    for channel, value in enumerate((0, 128, 255)):
        expected = (value / 255 - models.CLIP_MEAN[channel]) / models.CLIP_STD[channel]
        assert torch.allclose(clip.read_batch(pixels)[0, channel], torch.tensor(expected), atol=1e-5)


def knows_the_target(monkeypatch, oracle) -> None:
    """Let the oracle see what the loss will compare its answer with."""
    def target(kind, x0, noise, a, s):
        oracle.latents, oracle.target = x0, noise
        return noise
    monkeypatch.setattr(evaluate, "make_target", target)


DC = ("--method", "diffusion-classifier", "--dc-samples", "2", "6", "--dc-keep", "3", "--batch-size", "1000")


@pytest.mark.parametrize("target", ["data", "v", "noise"])
def test_the_denoising_error_equals_a_slow_reference(target: str) -> None:
    """And no picture's error depends on who else is in its batch."""
    model, source = build(replace(tiny_config(), image_target=target)), Numbered(3)
    args = parse_args(["row", "--batch-size", "2", "--seed", "4"])
    errors, alphas = [], make_alphas_cumprod("linear", 1000)
    for i in range(3):
        pixels = torch.full((1, 3, 32, 32), i / 127.5 - 1)
        z, context = model.encode_image(pixels), model.encode_text([f"picture {i}"])[0]
        for j, t in enumerate(range(50, 1000, 100)):
            noise = torch.randn(z.shape[1:], generator=generator_of(4, i, j))[None]
            a, s = alphas[t].sqrt().float(), (1 - alphas[t]).sqrt().float()
            z_t = a * z + s * noise
            with torch.no_grad():
                pred = model.denoise_image(z_t, torch.tensor([t]), context)
            x0 = {"data": pred, "v": a * z_t - s * pred, "noise": (z_t - s * pred) / a}[target]
            errors.append((x0 - z).square().mean().item())
    assert evaluate.denoising_error(model, source, args)[0] == pytest.approx(sum(errors) / 30, rel=1e-4)
    with pytest.raises(ValueError, match="not finite"), torch.no_grad():
        model.unet.conv_in.weight.fill_(math.nan)
        evaluate.denoising_error(model, source, args)


def test_a_row_is_what_the_single_tasks_say(base, monkeypatch) -> None:
    """Its scores are those of retrieval, zeroshot and checker; of what was trained, and of no more."""
    flags = ["--limit", "20"]
    args = parse_args(["row", *flags, "--n", "8", "--steps", "2"])
    args.data, val = "shapes", evenly_spaced(Shapes("val"), 20)
    found = evaluate.row(base, val, args)
    retrieval = run(evaluate.retrieval, base, val, *flags)
    classes = run(evaluate.zeroshot, base, evenly_spaced(Shapes("classes"), 20), *flags)
    assert found["mean_r1"] == retrieval["mean_r1"] and found["top1"] == classes["top1"]
    asked = [captions[0] for captions in usable_captions(evenly_spaced(val, 8), 8)]
    monkeypatch.setattr(evaluate, "held_out_captions", lambda count: asked)
    judged = run(evaluate.checker, base, None, "--n", "8", "--steps", "2")
    assert all(found[name] == judged[name] for name in ("colour", "shape", "size", "relation", "all"))
    for tasks, there, absent in ((("generation",), "denoising_error", "top1"),
                                 (("alignment",), "top1", "denoising_error")):
        one = build()
        one.tasks = tasks
        some = evaluate.row(one, val, args)
        assert there in some and absent not in some and "fid" not in some
    photos = evaluate.row(base, Numbered(6), parse_args(["row", "--data", "photos"]))
    assert "denoising_error" in photos and "protocol" not in photos, "pictures nobody looks at are not drawn"
    with pytest.raises(ValueError, match="no right answers"):
        evaluate.row(base, val, parse_args(["row", "--control", "no-image"]))


def test_diffusion_classifier_and_its_controls(base, monkeypatch) -> None:
    oracle = DrawingOracle(base, TEXTS)
    knows_the_target(monkeypatch, oracle)
    result = run(evaluate.zeroshot, oracle, Numbered(60), *DC)
    assert result["top1"] == 1.0 and result["method"] == "diffusion-classifier"
    for control in ("shuffle-images", "no-image", "shuffle-labels"):
        result = run(evaluate.zeroshot, oracle, Numbered(200), *DC, "--control", control)
        assert at_chance(result), f"{control}: {result['top1']}"


@torch.no_grad()
@pytest.mark.parametrize("target", ["noise", "v"])
def test_diffusion_classifier_equals_a_slow_reference(target: str) -> None:
    """One image, one class, one draw at a time; pruned classes stay behind those that went on."""
    model = build(tiny_config(image_target=target))
    args = parse_args(["zeroshot", *DC, "--seed", "3", "--batch-size", "4"])
    contexts = torch.randn(6, 24, 32, generator=torch.Generator().manual_seed(0)) * 30
    latents = torch.randn(3, 192, 4, 4, generator=torch.Generator().manual_seed(1))
    scores = evaluate.classify_by_loss(model, latents, [7, 8, 11], contexts, args)
    alphas = make_alphas_cumprod("linear", 1000)
    for row, place in enumerate((7, 8, 11)):
        def loss(k: int, j: int) -> float:
            t = torch.tensor([(2 * j + 1) * 1000 // 12])
            noise = torch.randn(1, 192, 4, 4, generator=generator_of(3, place, j))
            z, a, s = latents[row:row + 1], alphas[t].sqrt().float(), (1 - alphas[t]).sqrt().float()
            aim = noise if target == "noise" else a * noise - s * z
            return ((model.denoise_image(a * z + s * noise, t, contexts[k:k + 1]) - aim) ** 2).mean().item()
        first = {k: np.mean([loss(k, j) for j in (1, 4)]) for k in range(6)}
        kept = sorted(first, key=first.get)[:3]
        last = {k: np.mean([loss(k, j) for j in range(6)]) for k in kept}
        expected = sorted(kept, key=last.get) + sorted(set(first) - set(kept), key=first.get)
        assert scores[row].argsort(descending=True).tolist() == expected
        assert scores[row, kept[0]].item() - 1e4 == pytest.approx(-last[kept[0]], abs=1e-5)


def test_a_copying_model_is_not_above_chance_by_any_method(base) -> None:
    """It returns the noised input it was given, query or latents."""
    copying = Oracle(base, TEXTS, copies=True)
    copying.denoise_image = lambda noisy_latents, t_image, context: noisy_latents
    for flags in ((), DC):
        result = run(evaluate.zeroshot, copying, Numbered(200), *flags)
        assert result["top1_interval"][0] <= result["chance"] + 0.03, flags


def test_a_list_chooses_images_and_names_classes(base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    models.save(tmp_path / "c.pt", base)
    for i in range(12):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / f"pictures/{i}.png")
    lines = [f"{i}.png\tkind{i % 3}\n" for i in range(0, 12, 2)]
    (tmp_path / "pictures/some.txt").write_text("".join(lines))
    evaluate.main(["zeroshot", "--ckpt", "c.pt", "--data", "pictures/some.txt", "--device", "cpu",
                   "--json", "r.json"])
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["n"] == 6 and result["classes"] == 3 and result["data"] == "some"


def test_each_image_and_each_text_is_encoded_once(base, monkeypatch) -> None:
    seen: Counter = Counter()
    for name in ("encode_text", "read_batch"):
        def count(self, what, *rest, original=getattr(models.DiffDis, name), name=name):
            seen[name] += len(what)
            return original(self, what, *rest)
        monkeypatch.setattr(models.DiffDis, name, count)
    run(evaluate.zeroshot, base, Numbered(60), "--batch-size", "7")
    assert seen == {"encode_text": 5, "read_batch": 60}, "N images and K classes, not N times K"
    seen.clear()
    run(evaluate.retrieval, base, Numbered(60), "--batch-size", "7")
    assert seen == {"encode_text": 120, "read_batch": 60}


def test_the_ensemble_is_for_models_with_clips_vocabulary(base) -> None:
    args, sd = parse_args(["zeroshot"]), SimpleNamespace(config=models.PRESETS["sd-v1"])
    assert evaluate.pick_templates(sd, Numbered(5), args) == list(evaluate.ENSEMBLE)
    assert evaluate.pick_templates(base, Numbered(5), args) == ["a photo of a {}"]
    assert evaluate.pick_templates(sd, Shapes("classes"), args) == ["a {}"]
    args.templates = ["my {}"]
    assert evaluate.pick_templates(sd, Shapes("classes"), args) == ["my {}"]


def test_a_users_templates_stay_as_they_are(base, monkeypatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(evaluate, "encode_texts", lambda model, texts: (seen.extend(texts), torch.ones(
        len(texts), 4))[1])
    evaluate.class_queries(base, ["owl"], ["a {}"], verbatim=True)
    evaluate.class_queries(base, ["owl"], ["a {}"])
    assert seen == ["a owl", "an owl"]


def test_stages_draw_what_they_say(base, monkeypatch) -> None:
    times: list[float] = []
    original = type(base).denoise_image
    monkeypatch.setattr(type(base), "denoise_image", lambda self, z, t, c: (
        times.extend(t.tolist()), original(self, z, t, c))[1])
    args = parse_args(["zeroshot", "--method", "diffusion-classifier", "--dc-samples", "7", "13", "100",
                       "--dc-keep", "3", "2", "--batch-size", "2"])
    contexts = base.encode_text(["a", "b", "c", "d", "e"])[0]
    evaluate.classify_by_loss(base, torch.zeros(1, 192, 4, 4), [0], contexts, args)
    assert len(times) == 7 * 5 + 6 * 3 + 87 * 2 and set(times) == set(range(5, 1000, 10))


def test_separate_captions_are_separate_texts(base) -> None:
    class Karpathy(Numbered):
        captions = Source.captions
    karpathy = Karpathy(20)
    karpathy.texts = [["the same"] + [f"picture {i}"] * 2 for i in range(20)]
    result = run(evaluate.retrieval, Oracle(base, TEXTS), karpathy)
    assert result["n_texts"] == 60 and result["i2t_r1"] == 1.0
    assert result["t2i_r1"] < 1 and result["t2i_r1_chance"] == pytest.approx(1 / 20)
    assert result["mean_r1"] == pytest.approx((result["i2t_r1"] + result["t2i_r1"]) / 2)


# ---------------------------------------------------------------- several ranks
RANKS = """
import json, os, sys
import torch
import torch.distributed as dist
sys.path.insert(0, {tests!r})
from conftest import build, randomise
from test_evaluate import Numbered
import evaluate
from data import BadSample
class Broken(Numbered):
    def read(self, index, side=None):
        if self.rows[index] in (4, 9):
            raise BadSample("unreadable image", str(index))
        return super().read(index)
torch.set_num_threads(1)
if int(os.environ["WORLD_SIZE"]) > 1:
    dist.init_process_group("gloo")
model = build()
found = []
for task, *flags in (["retrieval", "--draws", "2"], ["zeroshot", "--draws", "2"],
                     ["zeroshot", "--method", "diffusion-classifier", "--dc-samples", "2", "--dc-keep"]):
    for control in ("none", "shuffle-images"):
        args = evaluate.parse_args([task, *flags, "--control", control, "--batch-size", "4",
                                    "--max-bad", "0.5"])
        result = evaluate.TASKS[task][0](model, Broken(23), args)
        found.append({{name: value for name, value in result.items() if name != "seconds_per_image"}})
if int(os.environ["RANK"]) == 0:
    print(json.dumps(found))
if dist.is_initialized():
    dist.destroy_process_group()
"""


def test_any_number_of_ranks_gives_the_same_scores(tmp_path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS.format(tests=str(ROOT / "tests")))
    said = []
    for world in (1, 2, 3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = [subprocess.Popen([sys.executable, str(tmp_path / "ranks.py")], stdout=subprocess.PIPE,
                                      env={**env, "RANK": str(rank)}, text=True) for rank in range(world)]
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert all(process.returncode == 0 for process in processes)
        said.append(json.loads(outputs[0]))
    assert said[0] == said[1] == said[2]
    assert said[0][0]["n"] == 21 and said[0][0]["skipped"]["skipped"] == {"unreadable image": 2}
