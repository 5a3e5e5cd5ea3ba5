"""Constants, and the list of model types, which users append to."""

from __future__ import annotations

import torch

from ..architectures.find import model_types

CPU = torch.device("cpu")
CUDA_0 = torch.device("cuda:0")
SUPPORTED_MODELS = model_types()
EXLLAMA_DEFAULT_MAX_INPUT_LENGTH = 2048
