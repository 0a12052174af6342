"""Getting reward models: only when asked, all or nothing, and nothing that is there is touched."""

import io
import sys
from pathlib import Path
from types import ModuleType

import pytest
from densegrpo.engine import rewards
from densegrpo.engine.rewards import MODEL_REWARDS, make_reward
from densegrpo.engine.rewards.download import download_reward, published_files, typed_yes
from densegrpo.engine.rewards.files import DEFAULT_ROOT, Need, missing

ENGINE = Path(rewards.__file__).resolve().parents[1]
CLIP_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}


class Hub:
    """Stands in for huggingface_hub: repositories by name, and what was asked of it."""

    def __init__(self):
        self.repositories = {
            "yuvalkirstain/PickScore_v1": CLIP_FILES | {"train.py", "pytorch_model.bin"},
            "openai/clip-vit-large-patch14": CLIP_FILES,
            "xswu/HPSv2": {"HPS_v2.1_compressed.pt", "HPS_v2.pt"},
        }
        self.calls = []
        self.fails_after = None

    def snapshot_download(self, repository, *, allow_patterns, local_dir):
        self.calls.append(repository)
        notes = Path(local_dir) / ".cache" / "huggingface"
        notes.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(sorted(self.repositories[repository] & set(allow_patterns))):
            if number == self.fails_after:
                (notes / f"{name}.incomplete").write_text("half")
                raise ConnectionError("the line is dead")
            (Path(local_dir) / name).write_text(f"{repository}/{name}")
        return str(local_dir)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    folder = tmp_path / "models"
    monkeypatch.setenv("DENSEGRPO_REWARD_MODELS", str(folder))
    return folder


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    found, module = Hub(), ModuleType("huggingface_hub")
    module.snapshot_download = found.snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return found


def download(name, agree=True):
    said = []
    return download_reward(name, said.append, lambda question: agree), "\n".join(said)


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_files_a_reward_needs_arrive_in_its_folder_and_no_others(root, hub):
    complete, said = download("pickscore")
    assert complete
    assert names(root) == {f"PickScore_v1/{name}" for name in CLIP_FILES}
    assert [path.name for path in root.iterdir()] == ["PickScore_v1"]
    assert missing(make_reward("pickscore").needs()[0]) is None
    for part in ("yuvalkirstain/PickScore_v1", "3.9 GB", "licence none stated", "merges.txt", str(root)):
        assert part in said


def test_nothing_happens_without_consent(root, hub):
    complete, said = download("pickscore", agree=False)
    assert not complete
    assert said.endswith("nothing was downloaded; answer y, or give --yes")
    assert not hub.calls
    assert not root.exists()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("y\n", True), (" YES \n", True), ("\n", False), ("n\n", False), ("yolo\n", False), ("", False)],
)
def test_only_a_yes_is_consent(monkeypatch, capsys, typed, expected):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert typed_yes("Download?") is expected
    assert capsys.readouterr().out == "Download? [y/N] "


@pytest.mark.parametrize("fails_after", range(len(CLIP_FILES)))
def test_a_download_that_breaks_off_leaves_nothing_at_its_place_and_can_be_repeated(root, hub, fails_after):
    hub.fails_after = fails_after
    with pytest.raises(
        ValueError, match=r"could not be downloaded \(ConnectionError: the line is dead\).*is as it was"
    ):
        download("pickscore")
    assert not (root / "PickScore_v1").exists()
    assert missing(make_reward("pickscore").needs()[0])
    hub.fails_after = None
    assert download("pickscore")[0]
    assert names(root) == {f"PickScore_v1/{name}" for name in CLIP_FILES}


def test_a_repository_without_the_files_is_named(root, hub):
    hub.repositories["yuvalkirstain/PickScore_v1"] = {"config.json", "vocab.json"}
    with pytest.raises(ValueError, match=r"yuvalkirstain/PickScore_v1 has no model\.safetensors; .* is as it was"):
        download("pickscore")
    assert not (root / "PickScore_v1").exists()


def test_what_is_complete_is_not_fetched_again(root, hub):
    download("pickscore")
    (root / "PickScore_v1/config.json").write_text("mine")
    complete, said = download("pickscore")
    assert complete
    assert "PickScore_v1 is complete" in said
    assert len(hub.calls) == 1
    assert (root / "PickScore_v1/config.json").read_text() == "mine"


def test_a_folder_that_lacks_some_files_gets_those_and_keeps_its_own(root, tmp_path, monkeypatch):
    other = tmp_path / "other"
    (other / "PickScore_v1").mkdir(parents=True)
    (other / "PickScore_v1/config.json").write_text("mine")
    monkeypatch.setenv("DENSEGRPO_REWARD_MODELS", f"{root}{';' if sys.platform == 'win32' else ':'}{other}")
    assert download("pickscore")[0]
    assert names(other) == {f"PickScore_v1/{name}" for name in CLIP_FILES}
    assert (other / "PickScore_v1/config.json").read_text() == "mine"
    assert not root.exists()


def test_one_folder_may_come_from_two_repositories(root, hub):
    assert download("hpsv2")[0]
    assert hub.calls == ["xswu/HPSv2", "openai/clip-vit-large-patch14"]
    assert names(root) == {f"HPSv2.1/{name}" for name in CLIP_FILES - {"config.json", "model.safetensors"}} | {
        "HPSv2.1/HPS_v2.1_compressed.pt"
    }


def test_files_that_are_published_elsewhere_come_with_the_command_that_gets_them(root):
    with pytest.raises(ValueError, match=r"aesthetic is not on the Hugging Face hub; get it with:  curl .*sac"):
        download("aesthetic")
    assert names(root) == {f"clip-vit-large-patch14/{name}" for name in CLIP_FILES}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "hf download you/other a.txt --local-dir {folder}",
            "not on the Hugging Face hub; get it with:  hf download you",
        ),
        ("hf download me/model a.txt", "not on the Hugging Face hub; get it with:  hf download me"),
        ("", "not on the Hugging Face hub; put the files into .*mine"),
    ],
)
def test_only_the_command_of_a_need_says_what_is_fetched(command, message):
    need = Need("mine", (("a.txt",),), "me/model", "1 KB", "MIT", command)
    with pytest.raises(ValueError, match=message):
        published_files(need)
    good = need._replace(command="hf download me/model a.txt b.txt --local-dir {folder}")
    assert published_files(good) == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("brightness", "reward brightness needs no files"), ("pikscore", r"unknown reward 'pikscore' \(did you mean")],
)
def test_there_is_not_always_something_to_download(name, message):
    with pytest.raises(ValueError, match=message):
        download(name)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"huggingface_hub cannot be imported .*pip install huggingface_hub"):
        download("pickscore")


def test_the_first_place_is_the_models_folder_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("DENSEGRPO_REWARD_MODELS")
    monkeypatch.chdir(tmp_path)
    assert download("pickscore")[0]
    assert (tmp_path / DEFAULT_ROOT / "PickScore_v1/model.safetensors").is_file()


@pytest.mark.parametrize("name", sorted(MODEL_REWARDS))
def test_every_published_file_of_a_reward_is_among_those_its_command_fetches(name):
    for need in make_reward(name).needs():
        for alternatives in need.files:
            assert not need.command or any(file in need.command for file in alternatives)


def test_only_the_command_line_can_download():
    sources = [path for path in ENGINE.parent.rglob("*.py") if "tests" not in path.parts and ".venv" not in path.parts]
    users = {path.name for path in sources if "download_reward" in path.read_text(encoding="utf-8")}
    assert users <= {"download.py", "cli_rewards.py"}
    hub_users = {path.name for path in sources if "snapshot_download" in path.read_text(encoding="utf-8")}
    assert hub_users == {"download.py"}
