"""The contract of an encoder, in one test."""

import torch
from tiny_tagger import TinyConvNeXt


def test_the_encoder_keeps_the_contract():
    encoder = TinyConvNeXt(channels=16, depth=1)
    feature_map = encoder(torch.randn(2, 160, 64), torch.ones(2))
    assert feature_map.shape == (2, encoder.out_channels, 64 // 16, 160 // encoder.frames_per_step)
    feature_map.mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
