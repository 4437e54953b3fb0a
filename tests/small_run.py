"""train.py with networks so small that a whole run takes seconds:
what the tests start as processes of their own."""
import sys

import conftest
import torch

import evaluate
import model
import train

torch.set_num_threads(1)
model.PRESETS["tiny"] = conftest.tiny_config()
model.CLIPS["clip-tiny"] = conftest.tiny_clip_config()
few = evaluate.held_out_captions(4)
evaluate.held_out_captions = lambda count: few     # a few pictures to judge will do
train.main(sys.argv[1:])
