"""The feature mapper: size, shapes, gradients, and the unconditional condition."""

from dataclasses import replace

import pytest
import torch

from mgp5 import Mgp5Error
from mgp5.config import MapperConfig
from mgp5.heads.minigpt5 import FeatureMapper

SMALL = MapperConfig(llm_width=24, width=16, queries=5, encoder_layers=2, decoder_layers=2, heads=2)


def small_mapper() -> FeatureMapper:
    torch.manual_seed(0)
    return FeatureMapper(SMALL)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_size_of_the_paper():
    with torch.device("meta"):
        mapper = FeatureMapper(MapperConfig(llm_width=4096, width=1024))
    assert count(mapper.mlp) == 5_244_928
    assert count(mapper.transformer) == 117_575_680
    assert mapper.queries.shape == (1, 77, 1024)
    assert count(mapper) == 5_244_928 + 117_575_680 + 77 * 1024


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_same_modules_as_torch_transformer():
    """Names and result are those of nn.Transformer, so weights of the paper's release fit."""
    mapper = small_mapper()
    twin = torch.nn.Transformer(16, 2, 2, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
    twin.load_state_dict(mapper.transformer.state_dict())
    states = torch.randn(3, 8, 24)
    expected = twin(mapper.mlp(states), mapper.queries.expand(3, -1, -1))
    torch.testing.assert_close(mapper(states), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_types_and_the_unconditional_condition_is_that_of_zeros(dtype):
    mapper = small_mapper().to(dtype).eval()
    condition = mapper(torch.randn(3, 8, 24))  # states of another type are taken too
    assert condition.shape == (3, 5, 16)
    assert condition.dtype == dtype
    torch.testing.assert_close(mapper.unconditional(8), mapper(torch.zeros(2, 8, 24))[:1])


def test_batch_equals_singles_and_training_equals_inference():
    mapper = small_mapper()
    states = torch.randn(3, 8, 24)
    trained = mapper(states)
    with torch.no_grad():
        mapper.eval()
        torch.testing.assert_close(mapper(states), trained, rtol=1e-5, atol=1e-5)
        singles = torch.cat([mapper(state[None]) for state in states])
    torch.testing.assert_close(singles, trained, rtol=1e-5, atol=1e-5)


def test_every_parameter_has_a_gradient():
    mapper = small_mapper()
    mapper(torch.randn(2, 8, 24)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in mapper.parameters())


def test_all_problems_are_reported_together():
    with pytest.raises(Mgp5Error) as caught:
        MapperConfig(llm_width=0, width=20, queries=-1)
    for part in ("llm_width is 0", "queries is -1", "width 20 is not a multiple of heads 8"):
        assert part in str(caught.value)


def test_size_for_stable_diffusion_3():
    """A transformer as wide as for 2.1, a projection to the rows and one to the pooled vector."""
    config = MapperConfig(llm_width=4096, width=4096, queries=334, inner=1024, pooled=2048)
    with torch.device("meta"):
        mapper = FeatureMapper(config)
    projections = 1025 * 4096 + 1025 * 2048
    assert count(mapper) == 5_244_928 + 117_575_680 + 334 * 1024 + projections


def test_the_pooled_vector_is_in_the_last_row():
    torch.manual_seed(0)
    mapper = FeatureMapper(replace(SMALL, inner=8, pooled=6))
    states = torch.randn(3, 8, 24)
    condition = mapper(states)
    rows = mapper.transformer(mapper.mlp(states), mapper.queries.expand(3, -1, -1))
    torch.testing.assert_close(condition[:, :-1], mapper.output(rows[:, :-1]))
    torch.testing.assert_close(condition[:, -1, :6], mapper.pool(rows[:, -1]))
    assert condition.shape == (3, 5, 16) and not condition[:, -1, 6:].any()


def test_decoder_only_is_causal_and_padded():
    torch.manual_seed(0)
    mapper = FeatureMapper(replace(SMALL, kind="decoder-only")).eval()
    states = torch.randn(3, 4, 24)
    condition = mapper(states)
    assert condition.shape == (3, 5, 16) and not condition[:, 4:].any()
    states[:, 2:] += 1
    later = mapper(states)
    torch.testing.assert_close(later[:, :2], condition[:, :2])
    assert not torch.allclose(later[:, 2:4], condition[:, 2:4])
    assert not any("queries" in name for name, _ in mapper.named_parameters())
