"""Long-tailed recognition: layout, losses, selection and head against slow references, both stages."""
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import build, error_of, tiny_clip_config
from convert_places_lt import convert
from make_cifar10_lt import ARTICLES, make
from PIL import Image
from torch.nn import functional as F

import evaluate
import model as models
from evaluate import LanguageGuidedHead, Reading, open_longtail

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
    """A small long-tailed set: 12, 3 and 1 training images of three classes, told by their grey."""
    for label, name in enumerate(("airplane", "art_gallery", "hall")):
        for split, count in (("train", 12), ("val", 3)):
            (tmp_path / "whole" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([label, i]).integers(80, size=(32, 32, 3)) + 70 * label
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "whole" / split / name / f"{i}.png")
    assert make(tmp_path / "whole", tmp_path / "lt", most=12, imbalance=12) == [12, 3, 1]
    return tmp_path / "lt"


# ---------------------------------------------------------------- the layout
def test_places_lt_becomes_lists_and_articles_by_name(places) -> None:
    made = open_longtail(str(places))
    assert made.test.classes == ["airplane", "art gallery", "hall"]
    assert " ".join(made.sentences[0]) == ARTICLES["airplane"] and made.sentences[1:] == [[], []]
    for split in ("train", "test"):
        lines = (places / f"{split}.txt").read_text().replace("\tairplane", " 0").replace("\thall", " 2")
        (places / f"Places_LT_{split}.txt").write_text("/" + lines.replace("\tart_gallery", " 1"))
        (places / f"{split}.txt").unlink()
    (places / "texts" / "airplane.txt").unlink()
    (places / "labels.txt").write_text("airfield 0\nart_gallery 1\nbeer/hall 2\n")
    (places / "wiki").mkdir()
    (places / "wiki" / "desc_0.txt").write_text(ARTICLE)
    convert(places)
    found = open_longtail(str(places))
    assert found.test.classes == ["airfield", "art gallery", "beer hall"] and len(found.test) == 9
    assert found.labels.tolist() == [0] * 12 + [1] * 3 + [2]
    assert found.test.read(8).label == 2 and found.sentences[1:] == [[], []]
    assert found.sentences[0] == [
        "An airfield is a place.", "Planes land there, e.g. small ones!", "It is flat.",
        "The first one was in the U.S.", "Army.", "Others followed?", "Sport."]


# ---------------------------------------------------------------- losses, sampling, mixing
def test_stage_1s_loss_equals_a_slow_reference() -> None:
    torch.manual_seed(0)
    logits, teacher, labels = 3 * torch.randn(6, 6), torch.randn(6, 6), torch.tensor([0, 1, 0, 2, 1, 0])
    slow = []
    for ours, theirs in ((logits, teacher), (logits.T, teacher.T)):
        for i in range(6):
            same = [j for j in range(6) if labels[j] == labels[i]]
            log_p = ours[i] - torch.logsumexp(ours[i], 0)
            slow.append(-0.9 * sum(log_p[j] for j in same) / len(same) - 0.1 * log_p.mean()
                        - (theirs[i].softmax(0) * log_p).sum())
    found = evaluate.stage_1_loss(logits, teacher, labels)
    assert torch.allclose(found, torch.stack(slow).mean() / 2, atol=1e-6)


def test_a_class_is_drawn_by_the_root_of_its_size() -> None:
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([400, 100, 25]))
    drawn = torch.cat([evaluate.balanced(labels, 25, 0, epoch) for epoch in range(100)])
    share = torch.bincount(labels[drawn], minlength=3) / len(drawn)
    assert torch.allclose(share, torch.tensor([20, 10, 5]) / 35, atol=0.01)
    assert torch.equal(drawn[:525], evaluate.balanced(labels, 25, 0, 0))


def test_mixtures_have_the_targets_of_their_shares() -> None:
    pixels, targets, kinds = torch.zeros(2, 16, 16, 3, dtype=torch.uint8), torch.eye(2), Counter()
    pixels[1] = 200
    for seed in range(40):
        mixed, soft = evaluate.mix(pixels, targets, np.random.default_rng(seed))
        assert torch.allclose(soft.sum(1), torch.ones(2)) and pixels[0].max() == 0
        assert torch.allclose(mixed[0].float().mean() / 200, soft[0, 1], atol=0.003)
        kinds["cut" if set(mixed.unique().tolist()) <= {0, 200} else "blend"] += 1
    assert min(kinds.values()) > 8, "a coin decides between mixup and CutMix"


# ---------------------------------------------------------------- scores, selection, head
def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def test_shots_are_the_usual_bins() -> None:
    hits, counts = torch.tensor([True, False, True, True]), torch.tensor([101, 100, 20, 19])
    found = evaluate.by_shot("top1", hits, torch.arange(4), counts)
    rates = {name: rate for name, rate in found.items() if not name.endswith("_interval")}
    assert rates == {"top1": 0.75, "top1_many": 1.0, "top1_medium": 0.5, "top1_few": 1.0}
    assert found["top1_medium_interval"] == evaluate.wilson(0.5, 2) and len(found) == 8


def test_anchors_are_the_sentences_of_least_loss(monkeypatch) -> None:
    torch.manual_seed(1)
    images, labels, texts = unit(20, 6), torch.arange(20) % 3, [unit(5, 6), unit(4, 6), unit(4, 6)]
    wide = evaluate.select_anchors(images, labels, texts, 4.0)
    assert wide.any(2).sum(1).tolist() == [5, 4, 4]
    monkeypatch.setattr(evaluate, "ANCHORS", 3)
    anchors = evaluate.select_anchors(images, labels, texts, 4.0)
    assert anchors.shape == (3, 3, 6) and anchors.any(2).all()
    for k, own in enumerate(texts):
        losses = [-torch.softmax(4.0 * images @ text, 0)[labels == k].log().mean().item() for text in own]
        best = sorted(range(len(own)), key=losses.__getitem__)[:3]
        assert torch.equal(anchors[k], own[best])


def test_the_head_equals_a_slow_reference_and_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    anchors = unit(4, 3, 8)
    anchors[2, 1:] = 0
    head, x = LanguageGuidedHead(anchors), unit(5, 8)

    def slow(image: torch.Tensor, sentences: torch.Tensor) -> torch.Tensor:
        q, keys = head.to_q(image), head.to_k(sentences)
        weights = torch.softmax(keys @ q / math.sqrt(len(q)), 0)
        return F.cosine_similarity((weights[:, None] * sentences).sum(0), image, 0) / 0.07
    with torch.no_grad():
        assert all(torch.equal(layer.weight, torch.eye(8)) for _, layer in head.attention)
        assert torch.allclose(head(x)[1][:, 2], x @ anchors[2, 0] / 0.07, atol=1e-5), "it has one sentence"
        for random in (False, True):
            for _, layer in head.attention if random else ():
                layer.weight.copy_(8 * torch.randn(8, 8))        # else what is absent weighs nothing
            visual, text = head(x)
            expected = torch.tensor([[slow(image, own[own.any(1)]) for own in anchors] for image in x])
            assert torch.allclose(text, expected, atol=1e-5)
        assert torch.allclose(head.predict(x), 0.2 * visual.softmax(1) + 0.8 * text.softmax(1), atol=1e-6)
        assert torch.allclose(visual, head.visual(x * 8 ** 0.5), atol=1e-5)
    trained = {name for name, _ in head.named_parameters()}
    assert not any(name.startswith(("anchors", "temperature")) for name in trained) and len(trained) == 10


def test_steps_are_adamws_at_a_rate_that_rises_and_falls(monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "WEIGHT_DECAY", 0.5)
    layer, slow = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    slow.load_state_dict(layer.state_dict())
    x = torch.randn(8, 2)

    def losses():
        for _ in range(6):
            yield layer(x).square().mean()
    evaluate.descend([(layer, 0.1)], losses(), 6, "test", warmup=2)
    optimizer = torch.optim.AdamW([{"params": [slow.weight], "weight_decay": 0.5},
                                   {"params": [slow.bias], "weight_decay": 0.0}])
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1, (step + 1) / 2) * (1 + math.cos(math.pi * step / 6)) / 2
        optimizer.zero_grad()
        slow(x).square().mean().backward()
        optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(layer.parameters(), slow.parameters()))
    with pytest.raises(ValueError, match="stage 1, step 0: the loss is not finite"):
        evaluate.descend([(layer, 0.1)], iter([torch.tensor(math.nan)]), 1, "stage 1")


# ---------------------------------------------------------------- both stages
QUICK = ["--device", "cpu", "--workers", "0", "--epochs", "2", "--head-epochs", "3", "--batch-size", "8",
         "--lr-scale", "20"]


@pytest.mark.parametrize("config", [None, tiny_clip_config()], ids=["diffdis", "clip"])
def test_two_stages_are_the_whole_and_the_seed_decides(places, monkeypatch, config) -> None:
    tune, tuned, train_head, heads = evaluate.fine_tune, [], evaluate.train_head, []
    models.save(places / "m.pt", build(config))
    monkeypatch.setattr(evaluate, "fine_tune", lambda *args: tuned.append(tune(*args)) or tuned[-1])
    monkeypatch.setattr(evaluate, "train_head", lambda *args: heads.append(train_head(*args)) or heads[-1])

    def run(ckpt: str, *flags: str) -> dict:
        evaluate.main(["longtail", "--data", str(places), "--json", str(places / "r.json"), *QUICK,
                       "--ckpt", str(places / ckpt), *flags])
        found = json.loads((places / "r.json").read_text())
        return {name: value for name, value in found.items() if name.startswith(("image_acc", "top1"))}
    whole, first = run("m.pt"), run("m.pt", "--head-epochs", "0")
    models.save(places / "stage1.pt", tuned[0])
    assert whole == {**first, **run("stage1.pt", "--epochs", "0")} and "top1" not in first
    assert {"image_acc", "top1_few"} <= set(whole)
    run("m.pt", "--seed", "1")
    ours, again, other = (list(head.parameters()) for head in heads)
    assert all(map(torch.equal, ours, again)) and not any(map(torch.equal, ours, other))


def test_stage_1_tunes_a_copy_and_no_autoencoder(places) -> None:
    model, data = build(), open_longtail(str(places))._replace(sentences=[["a"], ["b"], ["c"]])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = evaluate.fine_tune(model, data, 1, 100.0, Reading(batch_size=8)).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "not a copy"
    moved = {name for name, value in before.items() if not torch.equal(value, tuned[name])}
    assert moved and not any(name.startswith("autoencoder.") for name in moved)


def test_every_epoch_of_the_head_reads_other_mixtures(places, monkeypatch) -> None:
    counts, mixed, read, mix, data = [], [], evaluate.read_queries, evaluate.mix, open_longtail(str(places))
    monkeypatch.setattr(evaluate, "mix", lambda *args: mixed.append((args[0], *mix(*args))) or mixed[-1][1:])
    monkeypatch.setattr(evaluate, "read_queries",
                        lambda *args, **reading: counts.append(len(args[1])) or read(*args, **reading))
    for seed in (0, 0, 1):
        evaluate.train_head(build(), data, [torch.eye(32)[:2]] * 3, 3, 1.0, Reading(batch_size=8, seed=seed))
    assert sum(counts) == 3 * (16 + 3 * 16), "once to choose anchors, then each mixture"
    pictures, _, targets = map(torch.stack, zip(*mixed))
    assert torch.allclose(targets.sum(2), torch.ones(18, 8)) and len(targets.unique()) > 20, "shares differ"
    first, again, other = pictures.split(6)
    assert torch.equal(first, again) and not torch.equal(first, other), "the key decides"
    assert not any(torch.equal(first[:2], epoch) for epoch in first[2:].split(2)), "all epochs are one"
    plain = {np.asarray(data.train.image(i)).tobytes() for i in range(16)}
    share = np.mean([picture.numpy().tobytes() in plain for picture in first.flatten(0, 1)])
    assert share < 0.5, "RandAugment seldom leaves a picture as it is"


def test_learning_beats_chance_and_its_controls_do_not(places, monkeypatch) -> None:
    """The backbone tells brightness alone: the head must learn the classes' greys from it. Controls break the
    test images alone, and a training image's noise is not that of the test image of its number."""
    seen = set()

    def brightness(model, inputs, places, reading):
        seen.add((reading.seed, bool(inputs.any())))
        angle = 2 * inputs.flatten(1).mean(1)
        return F.pad(torch.stack([angle.cos(), angle.sin()], dim=1), (0, model.config.text.width - 2))
    monkeypatch.setattr(evaluate, "read_queries", brightness)
    monkeypatch.setattr(evaluate, "rand_augment", lambda image, rng: image)       # it changes brightness
    for control in evaluate.CONTROLS:
        seen.clear()
        found = evaluate.longtail(build(), open_longtail(str(places)), Reading(control=control, batch_size=8),
                                  epochs=0, head_epochs=200, lr_scale=300)
        assert found["top1"] > 0.6 if control == "none" else found["top1"] < 0.7, control
        assert found["chance"] == pytest.approx(1 / 3) and found["n_train"] == 16
        assert seen == {(0, control != "no-image"), (1, True)}, control


@pytest.mark.parametrize("change, flags, message", [
    (lambda p: None, ["--data", "shapes"], "longtail expects a folder with train.txt and test.txt"),
    (lambda p: (p / "test.txt").unlink(), [], "no data at"),
    (lambda p: (p / "texts" / "hal.txt").write_text("A."), [], "hal.txt is called as no class"),
    (lambda p: (p / "test" / "hall" / "1.png").unlink(), [], "1 of the 9 images in"),
    (lambda p: (p / "test.txt").write_text("test/hall/0.png\ntest/airplane/0.png\n"), [],
     "not of the same classes"),
    (lambda p: (p / "test.txt").write_text((p / "train.txt").read_text()), [], "16 images are in both"),
    (lambda p: (p / "train/hall/0.png").write_text("none"), ["--batch-size", "16"], "unreadable image"),
    (lambda p: (p / "train/hall/0.png").write_text("none"), ["--epochs", "0"], "unreadable image"),
    (lambda p: None, ["--lr-scale", "1e30", *QUICK[:-2]], "stage 1, step"),
    (lambda p: None, ["--lr-scale", "1e38", "--epochs", "0", "--batch-size", "8"], "stage 2, step")])
def test_mistakes_end_in_one_line(places, capsys, change, flags, message) -> None:
    change(places)
    models.save(places / "m.pt", build())
    argv = ["longtail", "--ckpt", str(places / "m.pt"), "--data", str(places), "--workers", "0", *flags]
    assert message in error_of(capsys, evaluate.main, argv, alone=False)
