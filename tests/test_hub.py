"""Names of models, combinations of parts, and mirrors of repositories that are gone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from tiny_training import join

from mgp5.apps.library import catalogue
from mgp5.apps.open_model import load
from mgp5.backbones.hf import HFBackbone
from mgp5.errors import Mgp5Error
from mgp5.generators.stable_diffusion import StableDiffusion
from mgp5.hub import REPOS, Parts, bases, from_hub, local_names, resolve
from mgp5.loading import build, save_checkpoint


def test_every_base_is_two_repositories_of_the_table():
    for name in bases():
        mllm, generator = name.split("+")
        parts = resolve(name)
        assert (parts.mllm, parts.diffusion, parts.trained) == (REPOS[mllm].id, REPOS[generator].id, None)
    assert len(bases()) == 25 and "qwen3-vl-4b+sd-3.5-medium" in bases()


def test_names_folders_and_ids_combine(llava_folder, diffusion_folder):
    assert resolve(f"{llava_folder}+sd-1.5").mllm == str(llava_folder)
    assert resolve(f"{llava_folder}+{diffusion_folder}").diffusion == str(diffusion_folder)
    assert resolve("me/mine+you/yours").diffusion == "you/yours"


@pytest.mark.parametrize(
    "name, hint",
    [
        ("sd-1.5", r"to train with, as in llava-1\.5-7b\+sd-2\.1-base"),
        ("vicuna-7b-v0", "to train with, as in"),
        ("demoo", r"did you mean demo\?"),
        ("lava-1.5-7b+sd2.1", r"did you mean llava-1\.5-7b\+sd-2\.1\?"),
        ("qwen2.5-v1-3b", r"did you mean qwen2\.5-vl-3b\?"),
        *((name, "here are demo and folders") for name in ("a+b+c", "me/mine+", "nothing", "+")),
    ],
)
def test_what_is_no_model_is_told_with_the_nearest_name(name, hint):
    with pytest.raises(Mgp5Error, match=f"no model .*{hint}") as error:
        resolve(name)
    assert error.value.exit_code == 2 and len(str(error.value)) < 140


def test_models_inside_the_package_share_the_parts_of_the_demo(llava_folder, diffusion_folder, tmp_path, monkeypatch):
    model = build(str(llava_folder), str(diffusion_folder), num_vokens=2)
    join(tmp_path / "demo", llava_folder, diffusion_folder)
    shared = {"mllm": "../demo/mllm", "diffusion": "../demo/diffusion"}
    for name, parts in (("demo", {"mllm": "mllm", "diffusion": "diffusion"}), ("demo-more", shared)):
        model.config = replace(model.config, **parts)
        save_checkpoint(model, tmp_path / name)
    monkeypatch.setattr("mgp5.hub.PACKAGED", tmp_path)
    assert local_names() == ["demo", "demo-more"]
    found = resolve("demo-more")
    assert found == Parts("demo-more", str(tmp_path / "demo/mllm"), str(tmp_path / "demo/diffusion"), found.trained)
    assert found.trained == tmp_path / "demo-more/mgp5"
    assert torch.equal(load("demo-more").head.mapper.queries, model.head.mapper.queries)
    monkeypatch.setattr("mgp5.apps.library.PACKAGED", tmp_path)
    rows = {row["name"]: row["bytes"] for row in catalogue() if row["generates"] and row["whole"]}
    own = sum(path.stat().st_size for path in (tmp_path / "demo-more/mgp5").iterdir())
    assert rows.keys() == {"demo", "demo-more"} and rows["demo-more"] == own
    with pytest.raises(Mgp5Error, match=r"did you mean demo-more\?"):
        resolve("demo-mor")


@pytest.mark.parametrize("name, load", [("llava-1.5-7b", HFBackbone.load), ("sd-2.1-base", StableDiffusion.load)])
def test_a_mirror_serves_where_the_first_cannot(name, load, llava_folder, diffusion_folder, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = str(llava_folder if load == HFBackbone.load else diffusion_folder)
    monkeypatch.setitem(REPOS, name, replace(REPOS[name], id="mgp5-test/gone", mirrors=("mgp5-test/too", folder)))
    asked = []

    def record(place, revision):
        asked.append((place, revision))
        return load(place, revision=revision)

    assert from_hub("mgp5-test/gone", record) is not None
    assert asked == [("mgp5-test/gone", REPOS[name].revision), ("mgp5-test/too", None), (folder, None)]
    assert capsys.readouterr().err.count("trying") == 2
    asked.clear()
    from_hub(folder, record)  # a mirror by its name
    assert asked == [(folder, None)]


def refuse(kind):
    def load(place, revision):
        try:
            raise kind("no", response=SimpleNamespace(headers={}, request=None))
        except kind as error:
            raise OSError(f"{place} is not a model") from error

    return load


def test_a_gated_repository_tells_how_to_get_in():
    with pytest.raises(Mgp5Error, match="accept it on its page on the hub"):
        from_hub(REPOS["sd-3.5-medium"].id, refuse(GatedRepoError))


def test_a_repository_without_mirror_fails_as_it_is():
    with pytest.raises(OSError, match="me/mine is not a model"):
        from_hub("me/mine", refuse(RepositoryNotFoundError))
