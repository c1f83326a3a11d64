"""Pooling against a slow restatement of its formulas."""

import pytest
import torch

from psla_sb.lobes.pooling import AttentionPooling, MeanPooling


def slow_attention(state, feature_map, n_heads):
    """The answer `[batch, classes]`, and each head's normalised attention `[batch, classes, steps]`."""
    x = feature_map.double().mean(2)
    answer, attentions = 0.0, []
    for head in range(n_heads):
        name = "" if n_heads == 1 else f".{head}"
        weight, bias = {}, {}
        for part in ("att", "cla"):
            weight[part] = state[f"{part}{name}.weight"][:, :, 0, 0].double()
            bias[part] = state[f"{part}{name}.bias"].double()
        a = torch.sigmoid(torch.einsum("kc,bcs->bks", weight["att"], x) + bias["att"][:, None]).clamp(1e-7, 1 - 1e-7)
        a = a / a.sum(2, keepdim=True)
        c = torch.sigmoid(torch.einsum("kc,bcs->bks", weight["cla"], x) + bias["cla"][:, None])
        head_weight = 1.0 if n_heads == 1 else state["head_weight"][head].double()
        answer = answer + head_weight * (a * c).sum(2)
        attentions.append(a)
    return answer, attentions


@pytest.mark.parametrize("n_heads", [1, 2, 4, 5])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_attention_pooling_is_the_formula(n_heads, scale):
    torch.manual_seed(n_heads)
    classifier = AttentionPooling(24, 7, n_heads)
    if n_heads > 1:
        classifier.head_weight.data = torch.linspace(0.1, 0.9, n_heads)
    feature_map = scale * torch.randn(3, 24, 4, 9)
    expected, attentions = slow_attention(classifier.state_dict(), feature_map, n_heads)
    torch.testing.assert_close(classifier(feature_map).double(), expected, atol=1e-5, rtol=0)
    for attention in attentions:
        torch.testing.assert_close(attention.sum(2), torch.ones(3, 7, dtype=torch.float64))


def test_attention_sums_to_one_over_the_steps():
    # where c is 1 at every step, the answer is the sum of the attention
    classifier = AttentionPooling(8, 3, 4)
    for conv in classifier.cla:
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.constant_(conv.bias, 50.0)
    torch.testing.assert_close(classifier(50 * torch.randn(2, 8, 4, 11)), torch.ones(2, 3))


def test_attention_is_at_least_1e_7():
    # attention 0.5 where c is 0, and next to nothing where c is 1
    classifier = AttentionPooling(1, 1, n_heads=1)
    for conv, weight, bias in ((classifier.att, -100.0, 0.0), (classifier.cla, 200.0, -100.0)):
        torch.nn.init.constant_(conv.weight, weight)
        torch.nn.init.constant_(conv.bias, bias)
    feature_map = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    assert classifier(feature_map).item() == pytest.approx(1e-7 / (0.5 + 1e-7), rel=1e-4)


def test_heads_can_push_the_answer_above_one():
    classifier = AttentionPooling(8, 3, 2)
    classifier.head_weight.data = torch.tensor([1.0, 1.0])
    for conv in classifier.cla:
        torch.nn.init.constant_(conv.bias, 50.0)
    feature_map = torch.randn(2, 8, 4, 5)
    assert (classifier(feature_map) > 1.5).all()
    assert classifier.segment_scores(feature_map).max() == 1


def test_published_layout_and_initial_values():
    torch.manual_seed(0)
    multi, single, mean = AttentionPooling(96, 200), AttentionPooling(96, 200, n_heads=1), MeanPooling(96, 200)
    shapes = {name: list(value.shape) for name, value in multi.state_dict().items()}
    expected = {f"{part}.{head}.weight": [200, 96, 1, 1] for part in ("att", "cla") for head in range(4)}
    expected |= {f"{part}.{head}.bias": [200] for part in ("att", "cla") for head in range(4)}
    assert shapes == expected | {"head_weight": [4]}
    assert multi.head_weight.tolist() == [0.25] * 4
    assert set(single.state_dict()) == {"att.weight", "att.bias", "cla.weight", "cla.bias"}
    assert set(mean.state_dict()) == {"cla.weight", "cla.bias"}
    default, wide = (1 / 96) ** 0.5, (6 / 96) ** 0.5
    for conv in (*multi.att, *multi.cla):
        assert 0.99 * default < conv.weight.abs().max() <= default
        assert conv.bias.abs().max() > 0
    for conv in (single.att, single.cla, mean.cla):
        assert 0.99 * wide < conv.weight.abs().max() <= wide
        assert conv.weight.std().item() == pytest.approx(wide / 3**0.5, rel=0.02)
        assert (conv.bias == 0).all()


def test_mean_pooling_is_the_formula():
    classifier, feature_map = MeanPooling(24, 7), torch.randn(3, 24, 4, 9)
    scores = torch.sigmoid(classifier.cla(feature_map.mean(2, keepdim=True)))[:, :, 0]
    torch.testing.assert_close(classifier.segment_scores(feature_map), scores)
    torch.testing.assert_close(classifier(feature_map), scores.mean(2))


@pytest.mark.parametrize("n_heads", [1, 3])
def test_segment_scores_are_the_heads_weighted_scores(n_heads):
    classifier, feature_map = AttentionPooling(24, 7, n_heads), torch.randn(3, 24, 4, 9)
    x = feature_map.mean(2, keepdim=True)
    convs = [classifier.cla] if n_heads == 1 else classifier.cla
    expected = sum(torch.sigmoid(conv(x))[:, :, 0] for conv in convs) / n_heads
    torch.testing.assert_close(classifier.segment_scores(feature_map), expected)


@pytest.mark.parametrize("classifier", [AttentionPooling(24, 7), MeanPooling(24, 7)], ids=["attention", "mean"])
def test_float32_under_autocast(classifier):
    feature_map = torch.randn(2, 24, 4, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, segments = classifier(feature_map), classifier.segment_scores(feature_map)
    assert torch.equal(scores, classifier(feature_map))
    assert torch.equal(segments, classifier.segment_scores(feature_map))
    assert classifier(feature_map.bfloat16()).dtype == torch.float32


def test_bad_arguments():
    with pytest.raises(ValueError, match="n_heads"):
        AttentionPooling(24, 7, n_heads=0)
    with pytest.raises(ValueError, match="n_classes"):
        MeanPooling(24, 0)


@pytest.mark.parametrize("n_heads", [1, 4])
def test_one_label_for_each_clip(n_heads):
    classifier = AttentionPooling(24, 7, n_heads, activation="softmax")
    x = torch.randn(3, 24, 4, 9)
    answer, steps = classifier(x), classifier.segment_scores(x)
    torch.testing.assert_close(answer.sum(1), torch.ones(3))
    torch.testing.assert_close(steps.sum(1), torch.ones(3, 9))
    # the formula, head by head
    mean, pooled = x.mean(2), 0.0
    for a, c, weight in classifier._heads():
        attention = torch.sigmoid(a(mean[:, :, None]))[:, :, 0]
        scores = c(mean[:, :, None])[:, :, 0].softmax(1)
        pooled = pooled + weight * (attention * scores).sum(2) / attention.sum(2)
    torch.testing.assert_close(answer, pooled / pooled.sum(1, keepdim=True), atol=1e-6, rtol=1e-5)
    # the form for a GPU, which computes all heads at once
    at_once = classifier._heads_at_once(mean.transpose(1, 2))
    torch.testing.assert_close(at_once, pooled, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="activation must be one of sigmoid, softmax, not 'relu'"):
        AttentionPooling(24, 7, n_heads, activation="relu")
