"""Score files on a real disk: what is written comes back, and nothing else is ever read or left."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megascore.errors import ScoreFileError
from megascore.scores.score_file import UNSEEN_VALUE, Scores, check_output_path, load_scores, split_key

FFN = "decoder.layers.{}.mlp.linear_fc2/ffn/l2_norm"
LAYERS = "decoder/layers/block_similarity"
CREATED = {"created": "2026-01-01T00:00:00+00:00"}


def make_scores(**metadata: object) -> Scores:
    values = {FFN.format(layer): torch.arange(1.0, 5.0) * (layer + 1) for layer in (10, 2, 0)}
    values[LAYERS] = torch.linspace(0, 1, 11)
    return Scores(values, {**CREATED, "num_tokens": 64, **metadata}, {LAYERS: [3]})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    scores = make_scores(model={"name": "tiny", "num_layers": 11}, loss=3.25)
    scores.save(tmp_path / "new" / "folder" / "s.safetensors")
    loaded = load_scores(tmp_path / "new" / "folder" / "s.safetensors")
    assert loaded == scores
    assert loaded.metadata["model"] == {"name": "tiny", "num_layers": 11}
    assert loaded.metadata["scores"] == ["ffn/l2_norm", "layers/block_similarity"]
    # A wheel of the package index leaves out of its metadata what it was built for.
    assert torch.__version__.startswith(loaded.metadata["versions"]["torch"])
    assert all(vector.dtype == torch.float64 for vector in loaded.values())


def test_keys_iterate_in_the_order_of_the_model() -> None:
    assert list(make_scores()) == [FFN.format(0), FFN.format(2), FFN.format(10), LAYERS]


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    forward, backward = (
        {"a/b/c": torch.ones(2), "d/e/f": torch.ones(3)},
        {"d/e/f": torch.ones(3), "a/b/c": torch.ones(2)},
    )
    Scores(forward, {**CREATED, "x": 1, "y": 2}).save(tmp_path / "one")
    Scores(backward, {"y": 2, "x": 1, **CREATED}).save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_nothing_in_it_can_be_changed() -> None:
    source = torch.ones(3)
    scores = Scores({"a/b/c": source}, {"model": {"name": "x"}}, {})
    source.zero_()
    scores["a/b/c"].zero_()
    scores.metadata["model"]["name"] = "y"
    scores.unseen["a/b/c"] = "all"
    assert scores["a/b/c"].tolist() == [1, 1, 1]
    assert scores.metadata["model"] == {"name": "x"}
    assert scores.unseen == {}
    with pytest.raises(TypeError):
        scores["a/b/c"] = source  # type: ignore[index]


def test_the_method_may_be_left_out_where_there_is_one() -> None:
    scores = Scores(
        {"s/ffn/x": torch.ones(1), "s/ffn/y": torch.ones(1), "t/ffn/x": torch.zeros(1)}, {}, {"u/ffn/x": "all"}
    )
    assert scores["t/ffn"].tolist() == [0]
    with pytest.raises(KeyError, match="s/ffn/x, s/ffn/y"):
        scores["s/ffn"]
    with pytest.raises(KeyError, match="no token reached it"):
        scores["u/ffn"]
    with pytest.raises(KeyError, match="near matches: t/ffn"):
        scores["t/ffm"]
    assert "u/ffn/x" not in scores
    assert scores.get("u/ffn/x") is None


def test_unseen_entries_do_not_look_measured(tmp_path: Path) -> None:
    values = {"a/ffn/x": torch.tensor([0.5, float("nan"), 0.0]), "b/ffn/x": torch.zeros(2)}
    scores = Scores(values, {}, {"a/ffn/x": [2, 1], "b/ffn/x": [0, 1]})
    scores.save(tmp_path / "s")
    loaded = load_scores(tmp_path / "s")
    assert loaded["a/ffn/x"].tolist() == [0.5, UNSEEN_VALUE, UNSEEN_VALUE]
    assert loaded.unseen == {"a/ffn/x": [1, 2], "b/ffn/x": "all"}
    assert list(loaded) == ["a/ffn/x"]


@pytest.mark.parametrize(
    ("values", "metadata", "unseen", "text"),
    [
        ({"a/b": torch.ones(2)}, {}, {}, "site/target/method"),
        ({"a/b/c": torch.ones(2, 2)}, {}, {}, "expected a vector"),
        ({"a/b/c": torch.ones(2, dtype=torch.int64)}, {}, {}, "expected a vector of floats"),
        ({"a/b/c": torch.tensor([1.0, float("inf")])}, {}, {}, "not finite at 1 of 2 entries, first at 1"),
        ({"a/b/c": torch.ones(2)}, {}, {"a/b/c": [2]}, "it has 2 scores"),
        ({"a/b/c": torch.ones(2)}, {"loss": float("nan")}, {}, "JSON"),
        ({"a/b/c": torch.ones(2)}, {"model": torch.nn.ReLU()}, {}, "JSON"),
    ],
)
def test_what_cannot_be_in_a_file_is_refused(values: dict, metadata: dict, unseen: dict, text: str) -> None:
    with pytest.raises(ScoreFileError, match=text):
        Scores(values, metadata, unseen)


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(ScoreFileError, match="exists already"):
        make_scores().save(path)
    assert path.read_text() == "precious"
    make_scores().save(path, overwrite=True)
    assert load_scores(path) == make_scores()


def test_the_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    make_scores().save(tmp_path / "s")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("s", "usual")}
    assert len(modes) == 1


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("old", [None, b"old content"])
def test_a_failed_write_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, old: bytes | None
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "s"
    if old is not None:
        path.write_bytes(old)
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(ScoreFileError, match=rf"{path}: No space left"):
        make_scores().save(path, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == before
    assert old is None or path.read_bytes() == old


def test_a_write_stopped_by_an_interrupt_leaves_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_scores().save(tmp_path / "s")
    assert os.listdir(tmp_path) == []


def test_a_file_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    make_scores().save(tmp_path / "s")
    assert events == ["fsync file", "replace", "fsync folder"]


def test_any_damaged_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    make_scores().save(path)
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    # Every byte of the tensors, and every 7th of the sizes, names and metadata before them; header padding is blank.
    for position in [*range(0, header_end, 7), *range(header_end, len(whole))]:
        if whole[position : position + 1] == b" ":
            continue
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x01]) + whole[position + 1 :])
        with pytest.raises(ScoreFileError, match=str(path)):
            load_scores(path)


def test_a_cut_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    make_scores().save(path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ScoreFileError, match="damaged"):
            load_scores(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScoreFileError, match="not found"):
        load_scores(tmp_path / "missing")
    with pytest.raises(ScoreFileError, match="is a folder"):
        load_scores(tmp_path)
    save_file({"a/b/c": torch.ones(2, dtype=torch.float64)}, tmp_path / "model.safetensors")
    with pytest.raises(ScoreFileError, match="no score file"):
        load_scores(tmp_path / "model.safetensors")
    torch.save({"a/b/c": torch.ones(2)}, tmp_path / "pickle.pth")
    with pytest.raises(ScoreFileError, match="safetensors"):
        load_scores(tmp_path / "pickle.pth")
    save_file({"a": torch.ones(2)}, tmp_path / "odd.safetensors", {"megascore": json.dumps(["no", "score", "file"])})
    with pytest.raises(ScoreFileError, match="unreadable metadata"):
        load_scores(tmp_path / "odd.safetensors")


def test_a_newer_schema_says_to_update(tmp_path: Path) -> None:
    make_scores(schema_version=3).save(tmp_path / "s")
    with pytest.raises(ScoreFileError, match=r"schema version 3.*reads up to 2: update megascore"):
        load_scores(tmp_path / "s")


def test_the_output_path_is_checked_and_left_as_it_was(tmp_path: Path) -> None:
    check_output_path(tmp_path / "new" / "deep" / "s", overwrite=False)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(ScoreFileError, match="exists already"):
        check_output_path(tmp_path / "file", overwrite=False)
    check_output_path(tmp_path / "file", overwrite=True)
    with pytest.raises(ScoreFileError, match="is a folder"):
        check_output_path(tmp_path, overwrite=True)
    with pytest.raises(ScoreFileError, match="no file can be made"):
        check_output_path(tmp_path / "file" / "s", overwrite=False)
    with pytest.raises(ScoreFileError, match="can't write"):
        check_output_path(tmp_path / ("n" * 300), overwrite=False)
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_without_write_permission_is_noticed_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write anywhere, so the refusal is played; what is under test is that a file is really tried.
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ScoreFileError, match=rf"no file can be made in {tmp_path} \(Permission denied\)"):
        check_output_path(tmp_path / "s", overwrite=False)


def test_keys_split_into_their_parts() -> None:
    key = split_key(LAYERS)
    assert (key.site, key.target, key.method) == ("decoder", "layers", "block_similarity")
    assert str(key) == LAYERS


def test_replacing_is_for_regular_files_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for special in (pipe, Path("/dev/null")):
        for write in (
            lambda path: check_output_path(path, overwrite=True),
            lambda path: make_scores().save(path, True),
        ):
            with pytest.raises(ScoreFileError, match="a device, a pipe or a socket"):
                write(special)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_link_is_followed_and_stays_one(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "link").symlink_to("old")
    with pytest.raises(ScoreFileError, match="exists already"):
        make_scores().save(tmp_path / "link")
    make_scores().save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert load_scores(tmp_path / "old") == load_scores(tmp_path / "link")


def test_links_to_no_file_and_to_devices_are_refused(tmp_path: Path) -> None:
    (tmp_path / "lost").symlink_to("no/such/folder")
    (tmp_path / "device").symlink_to("/dev/null")
    for name, message in (("lost", "no such folder"), ("device", "a device, a pipe or a socket")):
        with pytest.raises(ScoreFileError, match=message):
            make_scores().save(tmp_path / name, overwrite=True)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
