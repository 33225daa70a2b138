"""The head of SEED: codes in the sequence, four stages of training, replies whose images the LLM says in words."""

import copy
from dataclasses import replace

import pytest
import torch
from replies import check_together, force_images, reply, train_and_load
from tiny import picture
from toy_heads import CodesOptions

from mgp5 import Conversation, Image
from mgp5.config import LoraConfig
from mgp5.errors import Mgp5Error
from mgp5.events import ImageDone
from mgp5.generators.seed_stages import SeedTokenizerConfig
from mgp5.heads.losses import labelled, text_loss
from mgp5.hub import resolve
from mgp5.inference.reply import generate
from mgp5.inference.session import Session
from mgp5.loading import build, load_checkpoint, trained_tensors
from mgp5.options import SeedOptions, reply_options
from mgp5.training.batch import Collator
from mgp5.training.loop import train
from mgp5.training.presets import preset

K = 4
TINY = SeedTokenizerConfig(
    queries=K, width=16, heads=2, causal_layers=2, codes=12, code_width=4, block_layers=1, reverse_layers=1,
    text_positions=64, projection=8, dropout=0.0, split_codes=True,
)  # fmt: skip
TALK = Conversation().add("user", Image(pixels=picture("blue")), "draw")
STAGES = ("tokenizer-contrastive", "tokenizer", "pretrain", "finetune")


@pytest.fixture(scope="module")
def built(llava_folder, diffusion_folder):
    torch.manual_seed(0)
    model = build(str(llava_folder), str(diffusion_folder), head="seed", tokenizer=TINY).eval()
    with torch.no_grad():  # codes of all images are the same one where the codebook has begun
        model.head.tokenizer.quantizer.codebook.weight.normal_(std=0.3)
    return model


@pytest.fixture
def seed(built):
    return copy.deepcopy(built)


def config(stage, **values):
    own = {"batch": 2, "accumulation": 1, "warmup": 0, "steps": 2, "save_every": 1, "log_every": 1, "lr": 1e-2}
    own |= {"tokenizer": TINY, "precision": "fp32", "lora": LoraConfig(rank=2) if stage in STAGES[2:] else None}
    return replace(preset(stage, "demo", "seed"), **own | values)


def samples():
    names = ("red", "blue", "green", "white")
    images = [Image(pixels=picture(name), caption=f"{some} {name}") for name in names for some in ("a", "the")]
    return [Conversation().add("user", image.caption).add("assistant", image) for image in images]


def options(**values):
    return reply_options(SeedOptions, **{"temperature": 0.0, "max_tokens": 3, "max_images": 2, "steps": 2} | values)


def code_runs(model, keys):
    """The codes of the images in what a session has read; each must end in </img>."""
    first, *words, last = model.head.ids
    read = [token for token, _ in keys]
    runs = [read[at + 1 : at + 2 + K] for at, token in enumerate(read) if token == first]
    assert all(run[-1] == last and set(run[:-1]) <= set(words) for run in runs)
    return [run[:-1] for run in runs]


def losses(model, settings, data=None):
    batch = Collator(model.backbone, model.head, 512, settings)(data or samples()[:2])
    return model(batch, settings, torch.Generator().manual_seed(0)), batch


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_trains_its_part_resumes_bit_for_bit_and_loads(seed, stage, tmp_path, fresh_accelerator):
    rows, start, whole, loaded = train_and_load(seed, samples(), config(stage), tmp_path)
    terms = {
        "tokenizer-contrastive": {"contrastive"},
        "tokenizer": {"quantizer", "reconstruction", "condition", "codebook"},
    }.get(stage, {"text"})
    assert [set(row.losses) for row in rows] == [terms] * 2
    moved = {name for name in start if not torch.equal(start[name], whole[name])}
    assert all(name.startswith("tokenizer.causal.") == (stage == STAGES[0]) for name in moved)
    assert bool(moved) == (stage in STAGES[:2])
    assert (loaded.head, loaded.stage) == ("seed", stage)


def test_a_reply_has_two_images_of_k_codes_whatever_the_weights_and_they_are_not_encoded_again(seed):
    force_images(seed)
    session = Session(seed)
    events = list(generate(seed, TALK, options(code_top_p=1.0), session))
    message = events[-1].message
    assert sum(isinstance(event, ImageDone) for event in events) == len(message.images) == 2
    given, *drawn = code_runs(seed, session.keys)
    assert len(drawn) == 2 and all(len(run) == K for run in (given, *drawn)) and drawn[0] != drawn[1]
    encoded = []
    real = seed.backbone.vision_tokens
    seed.backbone.vision_tokens = lambda inputs: encoded.append(1) or real(inputs)
    talk = Conversation((*TALK.messages, message)).add("user", "again")
    reply(seed, talk, options(image="never"), session)
    assert code_runs(seed, session.keys)[:3] == [given, *drawn] and not encoded


def test_replies_in_a_batch_are_as_alone_and_options_of_codes_count(seed):
    force_images(seed)
    talks = [TALK, Conversation().add("user", "hello there")]
    check_together(seed, talks, options(code_top_p=1.0))
    runs, ways = {}, {"likely": {"code_temperature": 0.0}, "first": {"code_top_k": 1}, "any": {"code_top_p": 1.0}}
    for name, way in ways.items():
        session = Session(seed)
        reply(seed, talks[1], options(max_images=1, **way), session)
        runs[name] = code_runs(seed, session.keys)
    assert runs["likely"] == runs["first"] != runs["any"]
    with pytest.raises(Mgp5Error, match="options are CodesOptions, expected SeedOptions"):
        list(generate(seed, TALK, reply_options(CodesOptions)))
    with pytest.raises(Mgp5Error, match=r"code_top_p is 0\.0, expected above 0"):
        options(code_top_p=0.0)


def test_states_that_predict_codes_are_the_same_in_training_and_in_a_reply(seed):
    session, states = Session(seed), {}
    draw = seed.head.draw

    def watched(context):
        steps, answer = draw(context), None
        while True:
            try:
                request = steps.send(answer)
            except StopIteration as done:
                return done.value
            answer = yield request
            if answer is not None and answer.ids and answer.hidden.shape[1] == K:
                states["reply"] = answer.hidden

    seed.head.draw = watched
    force_images(seed)
    reply(seed, Conversation().add("user", "hello"), options(max_images=1, max_tokens=0, image="always"), session)
    read = torch.tensor([[token for token, _ in session.keys]])
    start = read[0].tolist().index(seed.head.ids[0])
    embeds = seed.backbone.embed(read, [])
    with torch.inference_mode():
        hidden = seed.backbone(embeds, seed.backbone.positions(read, None))
    torch.testing.assert_close(states["reply"], hidden[:, start : start + K], rtol=1e-4, atol=1e-4)


def test_captions_are_learnt_both_ways_and_whole(seed):
    settings = config("pretrain", both_ways=True, text_weight=1.0)
    result, batch = losses(seed, settings, samples())
    first, last = seed.head.ids[0], seed.head.ids[-1]
    begins = [row.tolist().index(first) for row in batch.ids]
    assert {start <= 1 for start in begins} == {True, False}  # image first, and caption first
    shown = [(row == -100).sum() - (mask == 0).sum() for row, mask in zip(batch.labels, batch.mask, strict=True)]
    assert max(map(int, shown)) <= 1 and all(last in row.tolist() for row in batch.ids)  # all but <s> is learnt
    filled = seed.head.complete(seed.backbone, batch, settings, torch.Generator())
    codes = seed.head.tokenizer.encode(seed.backbone.vision_tokens({"pixel_values": batch.targets["vision"]}))
    for row, start, code in zip(batch.target_rows, batch.target_starts, codes, strict=True):
        assert filled.ids[row, start + 1 : start + 1 + K].tolist() == [seed.head.ids[1 + c] for c in code.tolist()]
    states, targets = labelled(seed.hidden(filled), filled.labels)
    torch.testing.assert_close(result.terms["text"], text_loss(seed.backbone.logits(states), targets))
    cached = replace(batch, targets={"codes": codes.short()})
    assert torch.equal(seed.head.complete(seed.backbone, cached, settings, torch.Generator()).ids, filled.ids)


def test_the_whole_llm_trains_after_its_adapter_was_merged_and_is_stored(seed, tmp_path, fresh_accelerator):
    list(train(seed, samples(), config("pretrain"), tmp_path / "run"))
    model = load_checkpoint(resolve(str(tmp_path / "run")))
    settings = config("finetune", lora=None, whole_llm=True)
    list(train(model, samples(), settings, tmp_path / "whole"))
    stored = trained_tensors(model)
    names = {name for name in stored if name.startswith("llm.")}
    assert any("q_proj" in name for name in names) and not any("embed_tokens" in name for name in names)
    loaded = load_checkpoint(resolve(str(tmp_path / "whole")))
    torch.testing.assert_close(trained_tensors(loaded), stored, rtol=0, atol=0)
    with pytest.raises(Mgp5Error, match="whole_llm is set beside an adapter"):
        config("finetune", whole_llm=True)


def test_guidance_by_codes_asks_the_llm_once_and_again_after_training(seed):
    seed.head.config = replace(seed.head.config, unconditional="codes")
    codes = seed.head.unprompted_codes()
    words = torch.tensor(seed.head.ids[1:-1])
    ids = torch.tensor([[seed.backbone.tokenizer.bos_token_id, seed.head.ids[0], *words[codes[0]]]])
    hidden = seed.backbone(seed.backbone.embed(ids, []), seed.backbone.positions(ids, None))
    assert torch.equal(seed.backbone.logits(hidden[:, 1:-1])[..., words].argmax(-1), codes)  # all at once
    asked, real = [], seed.head.unprompted_codes
    seed.head.unprompted_codes = lambda: asked.append(1) or real()
    kept = [seed.head.unconditional(seed.head.condition(codes)) for _ in range(2)]
    torch.testing.assert_close(kept, [seed.head.condition(codes)] * 2)
    force_images(seed)
    assert reply(seed, TALK, options(guidance=5.0, max_images=1)).images and len(asked) == 1
    seed.train().eval()
    seed.head.unconditional(kept[0])
    assert len(asked) == 2


@pytest.mark.parametrize("source", ["zeros", "text"])
def test_the_unconditional_condition_is_the_one_that_is_named(seed, source):
    seed.head.config = replace(seed.head.config, unconditional=source)
    condition = seed.head.condition(torch.zeros(1, K, dtype=torch.long))
    expected = torch.zeros_like(condition) if source == "zeros" else seed.head.generator.encode_text([""])
    torch.testing.assert_close(seed.head.unconditional(condition), expected)


def test_presets_are_the_papers_and_the_releases_numbers():
    paper, release = preset("pretrain", "paper", "seed"), preset("pretrain", "release", "seed")
    assert (paper.lora.rank, paper.lora.alpha, len(paper.lora.targets)) == (16, 32, 7) and paper.both_ways
    assert (paper.tokenizer.queries, paper.tokenizer.codes, paper.tokenizer.code_width) == (32, 8192, 32)
    assert release.norms and not paper.norms and release.tokenizer.quantizer_loss == "legacy"
    contrastive = preset("tokenizer-contrastive", "paper", "seed")
    assert (contrastive.lr, contrastive.epochs, contrastive.lora) == (3e-5, 10, None)
    with pytest.raises(Mgp5Error, match="unknown stage 'codes': expected tokenizer-contrastive or tokenizer or"):
        preset("codes", "paper", "seed")
