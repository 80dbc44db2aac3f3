"""The engine: models, sampling, log-probabilities, memory, runs. It never reads a text."""
import os

for _name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):  # read when the library is imported
    os.environ.setdefault(_name, "1")
