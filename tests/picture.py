"""The README's second picture: a drawing for each of four texts, and what the same network reads from it.

    python tests/picture.py CKPT OUT.png [SEED]
"""
import sys

import conftest  # noqa: F401  (which puts the project on the import path)
from PIL import Image, ImageDraw, ImageFont

import model as models
from sample import draw_images, make_grid, score

TEXTS = ["a small yellow circle above a small blue circle", "a small blue circle above a small yellow circle",
         "a small yellow circle above a blue circle", "a small yellow circle above a small blue square"]
LEFT, SIDE, ROW = 350, 160, 28       # px: of the texts' column, of a picture, of a text's row


def main(ckpt: str, out: str, seed: str = "0") -> None:
    model, font = models.load(ckpt), ImageFont.load_default(15)
    images = draw_images(model, TEXTS, [int(seed) + k for k in range(4)])
    cosines = score(model, images, TEXTS, draws=4, seed=int(seed))
    odds = (cosines * model.logit_scale.exp()).softmax(dim=1)
    page = Image.new("RGB", (LEFT + 4 * SIDE, SIDE + ROW * len(TEXTS) + 8), "white")
    pen = ImageDraw.Draw(page)
    for j, text in enumerate(TEXTS):
        pen.text((8, SIDE + ROW * j + 5), text, "black", font)
    for k, image in enumerate(images):
        left = LEFT + k * SIDE
        page.paste(make_grid(image[None], 1, SIDE // 32 - 1, gap=0), (left + 16, 16))
        for j, share in enumerate(odds[k].tolist()):
            top = SIDE + ROW * j
            pen.rectangle((left + 16, top + 3, left + 16 + (SIDE - 32) * share, top + ROW - 4), "#a8c8f0")
            pen.text((left + 20, top + 5), f"{100 * share:.1f} %   {cosines[k, j]:.2f}", "black", font)
            if j == k:                   # what it was drawn for
                frame = (left + 14, top + 1, left + SIDE - 14, top + ROW - 2)
                pen.rectangle(frame, outline="#1f5fa8", width=2)
    page.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
