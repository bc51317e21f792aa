"""The two memory layouts of images, by the names that the tables use."""

import torch

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
