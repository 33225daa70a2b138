"""Golden losses: each term of both stages against a straight-line computation from the papers' equations.

Nothing of mgp5 computes the expected values: only transformers and diffusers modules and torch, with the weights of the
model under test. B samples, T tokens, P target images, K vokens.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from tiny import picture
from tiny_training import fresh
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, LlavaForConditionalGeneration

from mgp5 import Conversation, Image
from mgp5.training.batch import Collator
from mgp5.training.presets import preset

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")
VOKENS = [f"[IMG{i}]" for i in range(4)]
SEED = 5


@pytest.fixture
def ours(llava_folder, diffusion_folder):
    return fresh(llava_folder, diffusion_folder).eval()


@pytest.fixture
def llava(llava_folder):
    """Return the same LLM loaded by transformers, with new rows that are the mean of the others."""
    model = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    tokenizer = AutoTokenizer.from_pretrained(llava_folder)
    old = len(tokenizer)
    tokenizer.add_tokens(VOKENS, special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            weight[old:] = weight[:old].mean(0)
    return model, tokenizer


def straight(llava, ours, folder, texts, inputs, captions, min_snr=None, dropout=0.1):
    """Return the loss terms of one sample.

    Args:
        texts: prompt and answer, which ends in vokens.
        inputs: pixels in [-1, 1] of context image and target image.
    """
    model, tokenizer = llava
    context, target = inputs
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    ids = torch.tensor([before + after])
    image = tokenizer.convert_tokens_to_ids("<image>")
    slots = 4  # 28 pixels in patches of 14
    ids = torch.tensor([[i for token in ids[0].tolist() for i in [token] * (slots if token == image else 1)]])
    output = model.model(input_ids=ids, pixel_values=context, attention_mask=torch.ones_like(ids))
    hidden = output.last_hidden_state  # (1, T, D)
    logits = model.lm_head(hidden)
    terms = {"text": F.cross_entropy(logits[0, -len(after) - 1 : -1], torch.tensor(after))}  # eq. 1: all of the answer
    first = ids[0].tolist().index(tokenizer.convert_tokens_to_ids(VOKENS[0]))
    states = hidden[:, first - 1 : first + 3]  # those that predict the 4 vokens

    g = torch.Generator().manual_seed(SEED)
    zero = bool(torch.rand(1, generator=g) < dropout)  # section 3.3
    mapper = ours.head.mapper
    mlp = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.GELU(), torch.nn.Linear(16, 16))
    mlp.load_state_dict(mapper.mlp.state_dict())
    transformer = torch.nn.Transformer(16, 8, 4, 4, 64, 0.0, batch_first=True, norm_first=True)
    transformer.load_state_dict(mapper.transformer.state_dict())
    condition = transformer(mlp(states * (not zero)), mapper.queries)  # (1, 11, 16)

    load = {"pretrained_model_name_or_path": folder}
    vae = AutoencoderKL.from_pretrained(**load, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(**load, subfolder="unet")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    posterior = vae.encode(target).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
    latents = latents * vae.config.scaling_factor
    t = torch.randint(1000, (1,), generator=g)
    noise = torch.randn(latents.shape, generator=g)
    noisy = scheduler.add_noise(latents, noise, t)
    target = scheduler.get_velocity(latents, noise, t)  # the tiny pipeline predicts v
    error = (unet(noisy, t, condition).sample - target).square().mean()  # eq. 3
    if min_snr:
        alpha_bar = scheduler.alphas_cumprod[t]
        snr = alpha_bar / (1 - alpha_bar)
        error = error * torch.minimum(snr, torch.tensor(min_snr)) / (snr + 1)
    terms["ldm"] = error.squeeze()

    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    clip = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    tokens = clip([("" if zero else captions)], padding="max_length", max_length=11, truncation=True)
    encoding = text_encoder(torch.tensor(tokens.input_ids)).last_hidden_state
    terms["caption"] = F.mse_loss(condition, encoding)  # eq. 4
    return terms


def pixels(color: str, side: int, mean=(0.5,) * 3, std=(0.5,) * 3) -> torch.Tensor:  # (1, 3, side, side)
    data = torch.tensor(np.array(picture(color, (side, side))).reshape(-1, 3), dtype=torch.float32) / 255
    return ((data - torch.tensor(mean)) / torch.tensor(std)).T.reshape(1, 3, side, side)


CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@pytest.mark.parametrize("dropout", [0.0, 0.99])
@pytest.mark.parametrize("min_snr", [None, 5.0])
def test_pretraining(ours, llava, diffusion_folder, dropout, min_snr):
    talk = Conversation().add("user", "a fox").add("assistant", Image(pixels=picture("red", (16, 16)), caption="fox"))
    batch = Collator(ours.backbone, ours.head, 1000)([talk])
    config = replace(preset("pretrain"), guidance_dropout=dropout, min_snr=min_snr)
    losses = ours(batch, config, torch.Generator().manual_seed(SEED))
    texts = ("USER: a fox ASSISTANT:", "".join(VOKENS) + "</s>")
    inputs = (None, pixels("red", 16))
    expected = straight(llava, ours, diffusion_folder, texts, inputs, "fox", min_snr, dropout)
    check(losses, expected, {"text": 0.01, "ldm": 1.0, "caption": 0.1})


def test_finetuning(ours, llava, diffusion_folder):
    talk = Conversation().add("user", "here", Image(pixels=picture("blue", (28, 28))), "next?")
    talk = talk.add("assistant", "ok", Image(pixels=picture("green", (16, 16))))
    batch = Collator(ours.backbone, ours.head, 1000)([talk])
    losses = ours(batch, preset("finetune"), torch.Generator().manual_seed(SEED))
    texts = ("USER: here<image> next? ASSISTANT:", " ok" + "".join(VOKENS) + "</s>")
    inputs = (pixels("blue", 28, **CLIP), pixels("green", 16))
    expected = straight(llava, ours, diffusion_folder, texts, inputs, "")
    check(losses, {name: expected[name] for name in ("text", "ldm")}, {"text": 0.01, "ldm": 1.0})


def check(losses, expected, weights) -> None:
    assert losses.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses.terms[name], value, atol=1e-5, rtol=1e-5)
    total = sum(weights[name] * value for name, value in expected.items())
    torch.testing.assert_close(losses.total, total, atol=1e-5, rtol=1e-5)
