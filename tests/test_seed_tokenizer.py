"""SEED's tokenizer on tiny shapes: what its parts must hold, and the files of its release."""

import json
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tiny import picture
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from mgp5 import Mgp5Error
from mgp5.generators.seed_stages import SeedTokenizerConfig, VectorQuantizer, contrastive_loss
from mgp5.generators.seed_tokenizer import SeedTokenizer, SeedVision, load_blip2
from mgp5.heads.losses import gather_others

TINY = {
    "vision_width": 12, "queries": 4, "width": 16, "heads": 2, "causal_layers": 2, "codes": 16, "code_width": 4,
    "block_layers": 1, "reverse_layers": 2, "mlp_widths": (8, 6), "condition_length": 5, "condition_width": 10,
    "text_vocab": 30, "text_positions": 9, "projection": 6,
}  # fmt: skip
KINDS = {"text": (5, 10), "image": (1, 10), "image-mlp": (1, 10)}


def tokenizer(kind: str = "text", **options) -> SeedTokenizer:
    """One with weights so large that every input shows in the outputs."""
    torch.manual_seed(0)
    shape = TINY | {"detokenizer": kind, "condition_length": KINDS[kind][0]} | options
    made = SeedTokenizer(SeedTokenizerConfig(**shape)).eval()
    for value in made.parameters():
        if value.dim() > 1:
            nn.init.normal_(value, std=0.4)
    return made


def features(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 7, 12, generator=torch.Generator().manual_seed(1))


def captions(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 30, (count, 6), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 1
    return ids, torch.ones_like(ids)


def test_an_embedding_and_its_code_depend_on_earlier_queries_only():
    model = tokenizer()
    before, codes = model.embeddings(features()), model.encode(features())
    for changed in range(4):
        other = tokenizer()
        with torch.no_grad():
            other.causal.queries[:, changed] = torch.randn(16)
        after = other.embeddings(features())
        torch.testing.assert_close(after[:, :changed], before[:, :changed])
        assert torch.equal(other.encode(features())[:, :changed], codes[:, :changed])
        moved = (after - before).abs().amax((0, 2))
        assert (moved[changed:] > 1e-3).all()  # the changed one, and all behind it
    assert codes.shape == (3, 4) and codes.min() >= 0 and codes.max() < 16 and len(codes.unique()) > 2


def test_the_number_of_queries_makes_no_other_mask():
    before = tokenizer(queries=6).embeddings(features())
    shorter = tokenizer(queries=6)
    shorter.causal.queries = nn.Parameter(shorter.causal.queries[:, :3])
    torch.testing.assert_close(shorter.embeddings(features()), before[:, :3])


def test_the_text_path_is_bidirectional_and_ignores_padding():
    causal = tokenizer().causal
    ids, mask = captions()
    one = causal.text_features(ids, mask)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(3))
    last = ids.clone()
    last[:, -1] = (last[:, -1] + 5) % 30
    assert (causal.text_features(last, mask) - one).abs().max() > 1e-4  # the first token has read the last
    hidden = mask.clone()
    hidden[:, -1] = 0
    torch.testing.assert_close(causal.text_features(last, hidden), causal.text_features(ids[:, :-1], mask[:, :-1]))
    with pytest.raises(Mgp5Error, match="texts of 10 tokens, expected at most 9"):
        causal.text_features(torch.ones(1, 10, dtype=torch.long), None)


def test_contrastive_loss():
    images, texts = (F.normalize(torch.randn(4, 6), dim=-1) for _ in range(2))
    logits = images @ texts.T / 0.07
    wanted = [
        -0.9 * (rows.log_softmax(1).diag()).mean() - 0.1 * rows.log_softmax(1).mean() for rows in (logits, logits.T)
    ]
    loss = contrastive_loss(images, texts, torch.tensor(0.07), 0.1)
    torch.testing.assert_close(loss, sum(wanted) / 2)
    # Two processes with two pairs each: the mean of their losses is that of all four pairs.
    halves = [(images[:2], texts[:2]), (images[2:], texts[2:])]
    parts = [contrastive_loss(*halves[i], torch.tensor(0.07), 0.1, halves[1 - i]) for i in range(2)]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, loss)


def of_one_process(rank: int, pairs: torch.Tensor, store: str, out: mp.SimpleQueue) -> None:
    """Put the gradients of this process's pairs (2, N, P), whose share of the loss is that of its rows."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = (pairs[:, :2] if rank == 0 else pairs[:, 2:]).clone().requires_grad_()
    others = [gather_others(rows) for rows in mine]
    loss = contrastive_loss(*mine, torch.tensor(0.5), 0.1, others) * mine.shape[1] / pairs.shape[1]
    (gradient,) = torch.autograd.grad(loss, mine)
    out.put((rank, gradient.numpy()))
    dist.destroy_process_group()


def test_negatives_of_other_processes_count_and_learn(tmp_path):
    """Two processes, of two pairs and of one, have the gradients of one with all three."""
    pairs, context = torch.randn(2, 3, 4), mp.get_context("fork")
    out, whole = context.SimpleQueue(), pairs.clone().requires_grad_()
    workers = [context.Process(target=of_one_process, args=(i, pairs, str(tmp_path / "s"), out)) for i in range(2)]
    for worker in workers:
        worker.start()
    found = dict(out.get() for _ in workers)
    for worker in workers:
        worker.join()
    (expected,) = torch.autograd.grad(contrastive_loss(*whole, torch.tensor(0.5), 0.1), whole)
    torch.testing.assert_close(torch.cat([torch.tensor(found[i]) for i in range(2)], 1), expected)


@pytest.mark.parametrize(("name", "codebook", "commitment"), [("paper", 1.0, 0.25), ("legacy", 0.25, 1.0)])
def test_quantizer(name, codebook, commitment):
    quantizer = VectorQuantizer(SeedTokenizerConfig(**TINY, quantizer_loss=name))
    table = torch.tensor([[0.0] * 4, [1.0] * 4, [9.0] * 4])
    quantizer.codebook = nn.Embedding.from_pretrained(table, freeze=False)
    vectors = torch.tensor([[[0.2] * 4, [0.7] * 4]], requires_grad=True)
    result = quantizer(vectors)
    assert result.codes.tolist() == [[0, 1]]
    torch.testing.assert_close(result.vectors, table[None, :2])
    error = (0.2**2 + 0.3**2) / 2
    torch.testing.assert_close(result.loss, torch.tensor((codebook + commitment) * error))
    to_vectors, to_table = torch.autograd.grad(result.loss, [vectors, quantizer.codebook.weight], retain_graph=True)
    torch.testing.assert_close(to_vectors[0, :, 0], commitment * 2 * torch.tensor([0.2, -0.3]) / 8)
    torch.testing.assert_close(to_table[:, 0], codebook * 2 * torch.tensor([-0.2, 0.3, 0.0]) / 8)
    weights = torch.randn(1, 2, 4)
    straight, *_ = torch.autograd.grad((result.vectors * weights).sum(), [vectors])
    torch.testing.assert_close(straight, weights)


def test_codes_that_nothing_uses_are_split_off_those_that_most_use():
    """The same by any process: of 16 codes each of 16 clusters gets one or more; without, a few codes take all."""
    torch.manual_seed(0)
    centres = 3 * torch.randn(16, 4)
    used = {}
    for split in (False, True):
        quantizer = VectorQuantizer(SeedTokenizerConfig(codes=32, code_width=4, split_codes=split))
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
        for _ in range(300):
            quantizer(centres[:, None]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        used[split] = len(quantizer.nearest(centres).unique())
    assert used[True] >= 14 > used[False]
    assert torch.equal(quantizer.state_dict()["usage"], quantizer.usage)  # saved, so that a resumed run is the same
    twin = VectorQuantizer(SeedTokenizerConfig(codes=32, code_width=4, split_codes=True))
    twin.load_state_dict(quantizer.state_dict())
    quantizer.usage[3] = twin.usage[3] = 0
    quantizer.split(), twin.split()
    assert torch.equal(quantizer.codebook.weight, twin.codebook.weight) and float(quantizer.usage[3]) > 0
    mine, others = centres[:6, None], centres[6:, None]
    hits = torch.bincount(quantizer.nearest(others).flatten(), minlength=32).float()
    quantizer(mine, lambda rows: hits.expand_as(rows))  # another process has had these
    twin(centres[:, None])
    torch.testing.assert_close(quantizer.usage, twin.usage)
    quantizer.eval()(centres[:, None])
    torch.testing.assert_close(quantizer.usage, twin.usage)  # counted in training only


@pytest.mark.parametrize("kind", KINDS)
def test_stage_two_trains_what_follows_the_embeddings(kind):
    model = tokenizer(kind, dropout=0.5).train()
    target = torch.randn(3, *KINDS[kind])
    codes = model.encode(features())
    assert torch.equal(model.encode(features()), codes) and model.causal.training  # no dropout before the codes
    terms = model.stage_losses("tokenizer", features(), target=target)
    assert {name: weight for name, (_, weight) in terms.items()} == {
        "quantizer": 5.0, "reconstruction": 2.0, "condition": 0.5, "codebook": 0.0
    }  # fmt: skip
    assert terms["codebook"][0] == len(codes.unique()) / 16
    sum(value * weight for value, weight in terms.values()).backward()
    without = {name.split(".")[0] for name, value in model.named_parameters() if value.grad is None}
    assert without == {"causal"}
    model.eval()
    terms = model.stage_losses("tokenizer", features(), target=target, weights=(1.0, 2.0, 3.0))
    assert [weight for _, weight in terms.values()] == [1.0, 2.0, 3.0, 0.0]
    torch.testing.assert_close(terms["condition"][0], F.mse_loss(model.condition(codes), target))
    rebuilt = F.cosine_similarity(model.reconstruct(codes), model.embeddings(features()), dim=-1)
    torch.testing.assert_close(terms["reconstruction"][0], 1 - rebuilt.mean())


def test_stage_one_pulls_pairs_together():
    model = tokenizer(dropout=0.0).train()
    rate = torch.optim.AdamW(model.causal.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        ((loss, weight),) = model.stage_losses("tokenizer-contrastive", features(), texts=captions()).values()
        rate.zero_grad()
        loss.backward()
        rate.step()
        losses.append(float(loss))
    assert weight == 1.0 and losses[-1] < losses[0] / 2
    stage = {"stage": "tokenizer-contrastive", "features": features(), "texts": captions()}
    alone, gathered = (model.stage_losses(**stage, gather=gather)["contrastive"][0] for gather in (None, torch.neg))
    assert gathered > alone  # more negatives
    for stage, inputs in (("tokenizer", {}), ("tokenizer-contrastive", {}), ("pretrain", {"texts": captions()})):
        with pytest.raises(Mgp5Error, match=f"no losses of stage '{stage}'"):
            model.stage_losses(stage, features(), **inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_its_configuration_and_its_tensors(kind, tmp_path):
    model = tokenizer(kind)
    text = json.dumps(asdict(model.config))
    raw = json.loads(text)
    again = SeedTokenizer(SeedTokenizerConfig(**raw | {"mlp_widths": tuple(raw["mlp_widths"])})).eval()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.config == model.config
    codes = model.encode(features())
    assert torch.equal(again.encode(features()), codes)
    torch.testing.assert_close(again.condition(codes), model.condition(codes))
    assert model.condition(codes).shape == (3, *KINDS[kind])
    apart = model.condition(codes.flip(1)) - model.condition(codes)
    assert apart.abs().max() > 1e-3  # codes have positions
    other = next(each for each in KINDS if each != kind)
    with pytest.raises(RuntimeError, match=r"(Missing|Unexpected) key|size mismatch"):  # never strict=False
        tokenizer(other).load_state_dict(model.state_dict())


def test_a_bad_configuration_names_everything():
    bad = {"codes": 0, "heads": 3, "detokenizer": "image", "quantizer_loss": "ema", "dropout": 1.5}
    with pytest.raises(Mgp5Error) as error:
        SeedTokenizerConfig(**TINY | bad)
    for word in (
        "codes is 0",
        "multiple of heads 3",
        "condition_length is 5",
        "quantizer_loss is ema",
        "dropout is 1.5",
    ):
        assert word in str(error.value)


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    """A BLIP-2 with text path and one with a language model, of the real classes."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("blip2")
    layers = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 12, "image_size": 28, "patch_size": 14, **layers}
    reader = {"hidden_size": 16, "encoder_hidden_size": 12, "vocab_size": 30, "max_position_embeddings": 9, **layers}
    words = {
        "model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 16, "vocab_size": 20, **layers,
    }  # fmt: skip
    for name, kind, text in (("itm", Blip2ForImageTextRetrieval, True), ("opt", Blip2ForConditionalGeneration, False)):
        qformer_config = {**reader, "use_qformer_text_input": text}
        parts = {"vision_config": vision, "qformer_config": qformer_config, "text_config": words}
        config = Blip2Config(**parts, num_query_tokens=4, image_text_hidden_size=6)
        model = kind(config)
        nn.init.normal_(model.query_tokens)
        nn.init.normal_(model.vision_model.post_layernorm.weight)
        model.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", ["itm", "opt"])
def test_a_blip2_gives_the_tower_and_the_first_weights(blip2, name):
    model, released = tokenizer(text_vocab=30 if name == "itm" else 0), load_blip2(str(blip2 / name)).eval()
    model.causal.start_from(released)
    vision = SeedVision.load(str(blip2 / name)).train()
    pixels = vision.preprocess([picture("red"), picture("blue", (28, 70))])
    assert pixels.shape == (2, 3, 28, 28) and not vision.tower.training
    tokens = vision(pixels)
    assert tokens.shape == (2, 5, 12)
    with torch.no_grad():
        wanted = released.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(model.causal.norm(tokens), wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        first = released.qformer(
            query_embeds=released.query_tokens[:, :1].expand(2, -1, -1), encoder_hidden_states=wanted
        )
    torch.testing.assert_close(model.embeddings(tokens)[:, :1], first.last_hidden_state, atol=1e-4, rtol=1e-4)
    if name == "itm":
        ids, mask = captions()
        assert torch.equal(model.causal.text_projection.weight, released.text_projection.weight)
        embeds = released.embeddings(input_ids=ids)
        with torch.no_grad():
            states = released.qformer(query_embeds=embeds, query_length=0, attention_mask=mask).last_hidden_state
            wanted = F.normalize(released.text_projection(states[:, 0]), dim=-1)
        torch.testing.assert_close(model.causal.text_features(ids, mask), wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(Mgp5Error, match=r"queries has shape \(1, 5, 16\), that of BLIP-2 \(1, 4, 16\)"):
        tokenizer(queries=5).causal.start_from(released)
    with pytest.raises(Mgp5Error, match="cannot load"):
        SeedVision.load(str(blip2))
