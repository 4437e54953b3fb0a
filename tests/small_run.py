"""train.py with networks so small that a whole run takes seconds, and every step in the log:
what the tests start as processes of their own."""
import sys
from functools import partial

import conftest

import evaluate
import model
import train

model.PRESETS["tiny"] = conftest.tiny_config()
model.CLIPS["clip-tiny"] = conftest.tiny_clip_config()
train.LOG_EVERY = 1
train.checker = partial(evaluate.checker, n=4)     # a few pictures to judge will do
train.main(sys.argv[1:])
