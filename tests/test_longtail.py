"""Long-tailed recognition: layout, losses, selection and head against slow references, both stages."""
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, build, tiny_clip_config
from make_cifar10_lt import cifar10_lt
from PIL import Image
from torch.nn import functional as F

import evaluate
import model as models
import train
from data import SkipReport
from evaluate import class_contrast, distillation, open_longtail, soft_cross_entropy
from model import LanguageGuidedHead

CIFAR10 = Path(os.environ.get("DIFFDIS_DATA", ROOT.parent / "shared/data")) / "cifar10/train_jpeg.npz"
NAMES = ["airfield", "art_gallery", "beer/hall"]
TRAIN = {"airfield": 12, "art_gallery": 4, "hall": 1}
ARTICLE = """An airfield is a place. Planes land there, e.g. small ones! It is flat.
== History ==
The first one was in the U.S. Army. Others followed?
== References ==
A book. Another book.
== Use ==
Sport.
"""


@pytest.fixture()
def places(tmp_path):
    """A small set in Places-LT's layout: 12, 4 and 1 training images of three classes."""
    lists = {"train": [], "val": [], "test": []}
    for label, (folder, count) in enumerate(TRAIN.items()):
        for split, n in (("train", count), ("val", 2), ("test", 3)):
            (tmp_path / split / folder).mkdir(parents=True)
            for i in range(n):
                pixels = np.random.default_rng([label, i]).integers(80, size=(32, 32, 3)) + 70 * label
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / split / folder / f"{i:08d}.png")
                lists[split].append(f"{split}/{folder}/{i:08d}.png {label}")
    for split, lines in lists.items():
        (tmp_path / f"Small_LT_{split}.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "labels.txt").write_text("".join(f"{name} {k}\n" for k, name in enumerate(NAMES)))
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki" / "desc_0.txt").write_text(ARTICLE)
    return tmp_path


# ---------------------------------------------------------------- the layout
def test_the_layout_is_read(places) -> None:
    found = open_longtail(str(places))
    assert found.names == ["airfield", "art gallery", "beer hall"] and found.counts() == [12, 4, 1]
    assert (len(found.train), len(found.test)) == (17, 9)
    assert found.test.read(8).label == 2 and found.labels().tolist() == [0] * 12 + [1] * 4 + [2]
    assert found.sentences[0] == [
        "An airfield is a place.", "Planes land there, e.g. small ones!", "It is flat.",
        "The first one was in the U.S.", "Army.", "Others followed?", "Sport."]
    assert found.sentences[1:] == [[], []]
    (places / "labels.txt").write_text("airfield\t0\nart gallery\t1\nhall 2\n")
    assert open_longtail(str(places)).names == ["airfield", "art gallery", "hall"]
    (places / "labels.txt").unlink()
    assert open_longtail(str(places)).names == ["airfield", "art gallery", "hall"]


@pytest.mark.parametrize("change, message", [
    (lambda p: (p / "Small_LT_val.txt").unlink(), "has 0 files *val.txt, expected one list"),
    (lambda p: (p / "other_train.txt").write_text("x 0\n"), "has 2 files *train.txt"),
    (lambda p: (p / "test" / "hall" / "00000001.png").unlink(), "1 of the 9 images in"),
    (lambda p: (p / "Small_LT_test.txt").write_text("test/hall/0.png 3\n"), "has label 3, expected 0 to 2"),
    (lambda p: (p / "Small_LT_test.txt").write_text("train/hall/00000000.png 2\n"), "1 images are both in"),
    (lambda p: (p / "Small_LT_test.txt").write_text("test/hall/0.png\n"), "'test/hall/0.png', expected"),
    (lambda p: (p / "Small_LT_test.txt").write_text("test/hall/0.png -1\n"), "LABEL from 0"),
    (lambda p: (p / "Small_LT_val.txt").write_text("\n"), "is empty"),
    (lambda p: (p / "labels.txt").write_text("a 0\nb 1\nc 2\nd 3\n"),
     "no image of 1 of 4 classes, the first is 3 (d)"),
    (lambda p: (p / "labels.txt").write_text("a 0\nb 2\n"), "expected every number from 0 on"),
    (lambda p: (p / "labels.txt").write_text("a 0\nb 1\nc 1\n"), "3 pairs of label and name"),
    (lambda p: (p / "labels.txt").write_text("a 0\nb 1\n_ 2\n"), "each with a name"),
    (lambda p: (p / "Small_LT_train.txt").rename(p / "Places_LT_train.txt"), "has 62500, of 365"),
], ids=["no list", "two lists", "no image", "label", "trained on", "no label", "negative", "empty list",
        "empty class", "gap", "label twice", "no name", "Places"])
def test_bad_lists_are_refused_in_one_line_before_any_compute(places, capsys, change, message) -> None:
    change(places)
    models.save(places / "m.pt", build())
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["longtail", "--ckpt", str(places / "m.pt"), "--data", str(places)])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0], error


def test_shapes_follow_zipfs_law_and_share_no_picture() -> None:
    found = open_longtail("shapes")
    assert sorted(found.counts(), reverse=True) == [300 // k for k in range(1, 25)]
    pictures = [source.read(i).image.tobytes() for source in (found.train, found.test)
                for i in range(0, len(source), 3)]
    assert len(pictures) == len(set(pictures))
    assert all(found.train.read(i).label == found.labels()[i] for i in range(0, len(found.train), 50))


# ---------------------------------------------------------------- losses, sampling, mixing
def test_class_contrast_equals_a_slow_reference() -> None:
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(6, 6), torch.tensor([0, 1, 0, 2, 1, 0])
    slow = []
    for matrix in (logits, logits.T):
        for i in range(6):
            same = [j for j in range(6) if labels[j] == labels[i]]
            log_p = matrix[i] - torch.logsumexp(matrix[i], 0)
            slow.append(-0.9 * sum(log_p[j] for j in same) / len(same) - 0.1 * log_p.mean())
    assert torch.allclose(class_contrast(logits, labels, 0.1), torch.stack(slow).mean(), atol=1e-6)
    apart = torch.arange(6)       # classes of one image each, no smoothing: plain InfoNCE
    infonce = (F.cross_entropy(logits, apart) + F.cross_entropy(logits.T, apart)) / 2
    assert torch.allclose(class_contrast(logits, apart, 0.0), infonce)


def test_soft_cross_entropy_of_knowing_nothing() -> None:
    assert soft_cross_entropy(torch.zeros(1, 4), torch.full((1, 4), 0.25)) == pytest.approx(math.log(4))


def test_distillation_is_least_where_nothing_changed() -> None:
    torch.manual_seed(0)
    teacher = 2 * torch.randn(5, 5)
    logits = teacher.clone().requires_grad_()
    distillation(logits, teacher).backward()
    assert logits.grad.abs().max() < 1e-6
    p, q = teacher.softmax(1), teacher.T.softmax(1)
    entropy = -((p * p.log()).sum(1).mean() + (q * q.log()).sum(1).mean()) / 2
    assert torch.allclose(distillation(teacher, teacher), entropy, atol=1e-6)
    assert distillation(torch.randn(5, 5), teacher) > entropy


@pytest.mark.parametrize("flags, shares", [([], [20, 10, 5]), (["--balance", "0"], [400, 100, 25]),
                                           (["--balance", "1"], [1, 1, 1])])
def test_a_class_is_drawn_by_a_power_of_its_size(flags, shares: list[int]) -> None:
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([400, 100, 25]))
    args = evaluate.parse_args(["longtail", "--batch-size", "25", *flags])
    drawn = torch.cat([evaluate.balanced(labels, args, 0, epoch) for epoch in range(100)])
    share = torch.bincount(labels[drawn], minlength=3) / len(drawn)
    assert torch.allclose(share, torch.tensor(shares) / sum(shares), atol=0.01)
    assert torch.equal(drawn[:525], evaluate.balanced(labels, args, 0, 0))


@pytest.mark.parametrize("flags, cuts", [(["--mixup", "0.8", "--cutmix", "0"], False),
                                         (["--mixup", "0", "--cutmix", "1"], True)])
def test_mixtures_have_the_targets_of_their_shares(flags, cuts: bool) -> None:
    args = evaluate.parse_args(["longtail", *flags])
    pixels = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    pixels[1] = 200
    targets = torch.eye(2)
    for seed in range(20):
        mixed, soft = evaluate.mix(pixels, targets, args, np.random.default_rng(seed))
        assert torch.allclose(soft.sum(1), torch.ones(2)) and pixels[0].max() == 0
        assert torch.allclose(mixed[0].float().mean() / 200, soft[0, 1], atol=0.003)
        assert set(mixed.unique().tolist()) <= {0, 200} or not cuts
    nothing = evaluate.parse_args(["longtail", "--mixup", "0", "--cutmix", "0"])
    assert evaluate.mix(pixels, targets, nothing, np.random.default_rng(0))[0] is pixels


# ---------------------------------------------------------------- scores, selection, head
def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def test_sentence_accuracies_equal_a_slow_reference() -> None:
    torch.manual_seed(0)
    owners, labels = torch.arange(24) % 4, torch.arange(30) % 4
    centres = unit(4, 8)
    images, texts = (F.normalize(centres[c] + 0.3 * torch.randn(len(c), 8), dim=-1) for c in (labels, owners))
    found = evaluate.sentence_accuracies(images, labels, texts, owners,
                                         ["many", "medium", "medium", "few"])
    by_image, votes = [], []
    for image in images:
        order = sorted(range(24), key=lambda j: -float(image @ texts[j]))
        by_image.append(int(owners[order[0]]))
        count = Counter(int(owners[j]) for j in order[:5])
        votes.append(max(count, key=lambda c: (count[c], -[int(owners[j]) for j in order].index(c))))
    by_text = [int(labels[max(range(30), key=lambda i: float(images[i] @ text))]) for text in texts]
    right = np.array(by_image) == labels.numpy()
    assert found["image_acc"] == pytest.approx(right.mean()) and 0.3 < right.mean() < 1
    assert found["knn_acc"] == pytest.approx((np.array(votes) == labels.numpy()).mean())
    assert found["text_acc"] == pytest.approx((np.array(by_text) == owners.numpy()).mean())
    assert found["image_acc_many"] == pytest.approx(right[labels.numpy() == 0].mean())
    medium = np.isin(labels.numpy(), (1, 2))
    assert found["image_acc_medium"] == pytest.approx(right[medium].mean())
    assert found["image_acc_few"] == pytest.approx(right[labels.numpy() == 3].mean())


def test_shots_are_the_usual_bins() -> None:
    hits = torch.tensor([True, False, True, True])
    shots = evaluate.shots_of([101, 100, 20, 19], *evaluate.parse_args(["longtail"]).shots)
    assert shots == ["many", "medium", "medium", "few"]
    found = evaluate.by_shot(hits, torch.arange(4), shots)
    rates = {name: rate for name, rate in found.items() if not name.endswith("_interval")}
    assert rates == {"": 0.75, "_many": 1.0, "_medium": 0.5, "_few": 1.0}
    assert found["_medium_interval"] == evaluate.wilson(0.5, 2) and len(found) == 8
    found = evaluate.by_shot(hits[:2], torch.arange(2), shots)
    assert (found["_many"], found["_medium"]) == (1, 0) and "_few" not in found


def test_anchors_are_the_sentences_of_least_loss() -> None:
    torch.manual_seed(1)
    images, labels, texts, owners = unit(20, 6), torch.arange(20) % 3, unit(13, 6), torch.arange(13) % 3
    anchors, present = evaluate.select_anchors(images, labels, texts, owners, 4.0, 3)
    assert anchors.shape == (3, 3, 6) and present.all()
    for k in range(3):
        losses = {}
        for j in range(13):
            if owners[j] == k:
                p = torch.softmax(4.0 * images @ texts[j], 0)
                mine = [i for i in range(20) if labels[i] == k]
                losses[j] = -sum(math.log(p[i]) for i in mine) / len(mine)
        best = sorted(losses, key=losses.get)[:3]
        assert torch.equal(anchors[k], texts[best])
    wide, there = evaluate.select_anchors(images, labels, texts, owners, 4.0, 64)
    assert there.sum(1).tolist() == [5, 4, 4] and not wide[1, 4].any()


def slow_head(head: LanguageGuidedHead, x: torch.Tensor) -> torch.Tensor:
    text = torch.empty(len(x), len(head.anchors))
    for b, image in enumerate(x):
        for k, sentences in enumerate(head.anchors):
            own = sentences[head.present[k]]
            q, keys = head.to_q(head.norm_q(image)), head.to_k(head.norm_k(own))
            weights = torch.softmax(keys @ q / math.sqrt(len(q)), 0)
            text[b, k] = F.cosine_similarity((weights[:, None] * own).sum(0), image, 0) / 0.07
    return text


def test_the_head_equals_a_slow_reference_and_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    anchors, present = unit(4, 3, 8), torch.ones(4, 3, dtype=torch.bool)
    present[2, 1:] = False
    head, x = LanguageGuidedHead(anchors, present, 8), unit(5, 8)
    assert all(torch.equal(layer.weight, torch.eye(8)) for layer in (head.to_q, head.to_k))
    with torch.no_grad():
        assert torch.allclose(head(x)[1], slow_head(head, x), atol=1e-5)
        assert torch.allclose(head(x)[1][:, 2], x @ anchors[2, 0] / 0.07, atol=1e-5), "it has one sentence"
        for layer in (head.to_q, head.to_k):
            layer.weight.copy_(torch.randn(8, 8))
        visual, text = head(x)
        assert torch.allclose(text, slow_head(head, x), atol=1e-5)
        mixture = 0.2 * visual.softmax(1) + 0.8 * text.softmax(1)
        assert torch.allclose(head.predict(x), mixture, atol=1e-6)
        two = LanguageGuidedHead(anchors, present, 3)         # query and other visual features
        visual, text = two(torch.cat([x, 2 * x[:, :3]], dim=1))
        assert torch.allclose(text, slow_head(two, x), atol=1e-5)
        assert torch.allclose(visual, two.visual(2 * x[:, :3] * 3 ** 0.5), atol=1e-5)
    trained = {name for name, _ in head.named_parameters()}
    assert not any(name.startswith(("anchors", "temperature")) for name in trained) and len(trained) == 10


def test_the_gradients_representation_is_the_one_that_is_scored(model) -> None:
    args = evaluate.parse_args(["longtail", "--seed", "3"])
    latents = torch.randn(4, *model.latent_shape(32, 32))
    noise = evaluate.noise_of((model.config.text.width,), [(3, i, 0) for i in range(4)])
    scored = evaluate.read_queries(model, latents, list(range(4)), args)
    assert torch.allclose(evaluate.representation(model, latents, noise), scored, atol=1e-5)


# ---------------------------------------------------------------- both stages
QUICK = ["--epochs", "2", "--head-epochs", "3", "--batch-size", "8", "--lr", "1e-3", "--head-lr", "1e-3",
         "--warmup-epochs", "0"]


@pytest.mark.parametrize("kind", ["diffdis", "clip"])
def test_two_stages_are_the_whole_and_the_seed_decides(places, capsys, monkeypatch, kind: str) -> None:
    model = build() if kind == "diffdis" else build(tiny_clip_config())
    models.save(places / "m.pt", model)

    heads, rates = [], []
    trained, descend = evaluate.train_heads, evaluate.descend
    monkeypatch.setattr(evaluate, "train_heads", lambda model, data, head, linear, *rest: (
        trained(model, data, head, linear, *rest), heads.append((head.state_dict(), linear.state_dict()))))
    monkeypatch.setattr(evaluate, "descend", lambda optimizer, *rest: (
        descend(optimizer, *rest), rates.append(optimizer.param_groups[0]["lr"])))

    def run(*flags: str) -> dict:
        evaluate.main(["longtail", "--data", str(places), "--workers", "0", "--json", str(places / "r.json"),
                       *QUICK, *flags])
        told = json.loads((places / "r.json").read_text())
        kept = ("image_acc", "text_acc", "knn", "top1", "linear")
        return {name: value for name, value in told.items() if name.startswith(kept)}
    start, stage1 = ["--ckpt", str(places / "m.pt")], str(places / "stage1.pt")
    whole = run(*start)
    first = run(*start, "--stage", "pretrain", "--out", stage1)
    second = run("--ckpt", stage1, "--stage", "finetune")
    assert whole == {**first, **second} and {"image_acc", "top1", "linear_few"} <= set(whole)
    for one, two in zip(*heads):
        assert all(torch.equal(value, two[name]) for name, value in one.items()), "all equals its two stages"
    assert rates[:4] == pytest.approx([1e-3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])
    assert models.load(stage1).tasks == ("alignment",), "it has unlearnt to draw"
    changed = models.load(stage1).state_dict()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, changed[name])]
    assert moved and "top1" not in first
    run(*start, "--seed", "1")
    assert not all(torch.equal(value, heads[2][0][name]) for name, value in heads[0][0].items())
    assert "longtail on" in capsys.readouterr().out


def test_what_nothing_changes_is_read_once_and_what_mixes_is_read_again(places, monkeypatch) -> None:
    model, read = build(), []
    found = open_longtail(str(places))
    whole = evaluate.read_queries
    monkeypatch.setattr(evaluate, "read_queries",
                        lambda model, inputs, *rest: read.append(len(inputs)) or whole(model, inputs, *rest))
    flags = ["longtail", "--data", str(places), "--batch-size", "8", "--head-epochs", "3"]
    for more, count in ((["--mixup", "0", "--cutmix", "0", "--no-augment"], 17), (["--no-augment"], 3 * 16),
                        (["--augment", "--mixup", "0", "--cutmix", "0"], 3 * 16)):
        args = evaluate.parse_args([*flags, *more])
        read.clear()
        batches = list(evaluate.head_batches(model, found, SkipReport(1), args))
        assert sum(read) == count and len(batches) == 6
        assert all(torch.allclose(targets.sum(1), torch.ones(8)) for _, targets in batches)


def test_learning_beats_chance_and_its_controls_do_not(places, monkeypatch) -> None:
    """The backbone tells brightness alone: both heads must learn the classes' greys from it."""
    def brightness(model, inputs, places, args):
        angle = 2 * inputs.flatten(1).mean(1)
        return F.pad(torch.stack([angle.cos(), angle.sin()], dim=1), (0, model.config.text.width - 2))
    monkeypatch.setattr(evaluate, "read_queries", brightness)
    models.save(places / "m.pt", build())

    def run(*more: str) -> dict:
        evaluate.main(["longtail", "--ckpt", str(places / "m.pt"), "--data", str(places), "--workers", "0",
                       "--attention-lr", "1e-2", "--stage", "finetune", "--mixup", "0", "--cutmix", "0",
                       "--no-augment",
                       "--batch-size", "8", "--head-epochs", "200", "--head-lr", "1e-2",
                       "--json", str(places / "r.json"), *more])
        return json.loads((places / "r.json").read_text())
    found = run()
    assert found["linear"] > 0.9 and found["top1"] > 0.6
    for control in ("shuffle-labels", "shuffle-images", "no-image"):
        broken = run("--control", control)
        assert broken["linear"] < 0.7 and broken["top1"] < 0.7


def test_what_cannot_be_read_is_counted_and_noise_names_no_image(places, capsys, monkeypatch) -> None:
    """And no training image has the noise of the test image of its number, which would tell its class."""
    models.save(places / "m.pt", build())
    (places / "train" / "airfield" / "00000003.png").write_bytes(b"no image")
    seeds: list[tuple] = []
    whole = evaluate.read_queries
    monkeypatch.setattr(evaluate, "read_queries", lambda model, inputs, numbers, args: (
        seeds.append((args.seed, len(inputs))), whole(model, inputs, numbers, args))[1])
    flags = ["longtail", "--ckpt", str(places / "m.pt"), "--data", str(places), "--stage", "finetune",
             "--workers", "0", "--mixup", "0", "--cutmix", "0", "--no-augment", "--head-epochs", "1",
             "--json", str(places / "r.json"), "--max-bad", "0.5"]
    evaluate.main(flags)
    told = json.loads((places / "r.json").read_text())
    assert told["skipped_training"]["skipped"] == {"unreadable image": 2} and told["n"] == 9      # read twice
    assert [seed for seed, _ in seeds] == [0, 1, 1]
    (places / "train" / "hall" / "00000000.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        evaluate.main(flags)
    assert "none of the training images of class 2 can be read" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--text-steps", "2000"], "--text-steps is 2000, of 1000"),
    (["--shots", "20", "100"], "--shots is 20 100, expected MANY, then FEW"),
    (["--smoothing", "2"], "--smoothing is 2.0, expected 0 to 1"),
    (["--batch-size", "1"], "--batch-size is 1, expected 2"),
    (["--out", "x.pt", "--stage", "finetune"], "changes none"),
    (["--out", "m.pt"], "--out is the checkpoint itself"),
    (["--out", "no/x.pt"], "expected a file in an existing folder"),
    (["--lr", "1e30", "--workers", "0", "--warmup-epochs", "0", "--batch-size", "8"], "not finite"),
    (["--head-lr", "1e30", "--attention-lr", "1e30", "--stage", "finetune", "--workers", "0",
      "--batch-size", "8", "--no-augment", "--mixup", "0", "--cutmix", "0"], "stage 2, step"),
    (["--data", "places-lt"], "no folder at places-lt")])
def test_mistakes_end_in_one_line(places, capsys, monkeypatch, flags, message) -> None:
    monkeypatch.chdir(places)
    models.save(places / "m.pt", build())
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["longtail", "--ckpt", "m.pt", "--data", str(places), *flags])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(told) == 1 and message in told[0]


# ---------------------------------------------------------------- from training to the head
def base(tmp_path, name: str, *flags: str) -> str:
    """A model trained for a moment -> its checkpoint."""
    train.main(["--out", str(tmp_path / name), "--workers", "0", "--val", "10", "--no-validate",
                "--warmup", "10", "--tasks", "alignment", *flags])
    return str(tmp_path / name / "checkpoint.pt")


def both_stages(tmp_path, checkpoint: str, *flags: str) -> dict:
    evaluate.main(["longtail", "--ckpt", checkpoint, "--workers", "0", "--json", str(tmp_path / "r.json"),
                   *flags])
    return json.loads((tmp_path / "r.json").read_text())


@pytest.mark.parametrize("kind", [["--preset", "tiny"], ["--model", "clip-tiny", "--no-augment"]])
def test_cifar10_lt_from_nothing_to_the_head(tmp_path, kind) -> None:
    """A tenth of CIFAR-10-LT, imbalance 100: minutes from random weights to what the head says."""
    if not CIFAR10.is_file():
        pytest.skip(f"no CIFAR-10 at {CIFAR10}")
    held = np.load(CIFAR10)
    names, (labels, ends) = [str(name) for name in held["class_names"]], (held["labels"], held["offsets"])
    jpegs, taken = held["jpeg"].tobytes(), Counter()
    for i in range(len(labels)):
        split = "val" if i % 10 == 0 else "train"
        taken[split, labels[i]] += 1
        if taken[split, labels[i]] <= (445 if split == "train" else 30):
            folder = tmp_path / "cifar10" / split / names[labels[i]]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:05d}.jpg").write_bytes(jpegs[ends[i]:ends[i + 1]])
    counts = cifar10_lt(tmp_path / "cifar10", tmp_path / "lt", most=440, of_val=5)
    assert counts == [440, 263, 158, 94, 56, 34, 20, 12, 7, 4]
    checkpoint = base(tmp_path, "run", "--data", str(tmp_path / "lt"), "--steps", "60", *kind)
    found = both_stages(tmp_path, checkpoint, "--data", str(tmp_path / "lt"), "--epochs", "3", "--lr", "3e-4",
                        "--warmup-epochs", "0", "--head-epochs", "20", "--head-lr", "3e-3", "--no-augment",
                        "--mixup", "0", "--cutmix", "0", "--batch-size", "64")
    assert found["classes_by_shot"] == {"many": 3, "medium": 4, "few": 3} and found["described"] == 10
    assert found["n"] == 300 and found["n_train"] == sum(counts) and not found["skipped"]["skipped"]
    assert found["top1"] > 0.15 and found["linear"] > 0.15 and found["image_acc"] > 0.12      # chance is 0.1


def test_both_stages_run_on_shapes_by_zipfs_law(tmp_path) -> None:
    checkpoint = base(tmp_path, "run", "--steps", "5")
    found = both_stages(tmp_path, checkpoint, "--limit", "96", "--epochs", "1", "--lr", "3e-4",
                        "--warmup-epochs", "0", "--head-epochs", "2", "--mixup", "0", "--cutmix", "0")
    assert found["classes_by_shot"] == {"many": 2, "medium": 13, "few": 9} and found["n"] == 96
    assert {"image_acc_few", "top1_few", "linear_few"} <= set(found), "of all three"
