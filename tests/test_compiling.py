"""Few graphs for many sizes, what they cost told, what comes again warned of, and a folder of this user's alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.runtime.runtime_utils import cache_dir

from dit import compiling
from dit.compiling import Compiled, CompileWatch, compile_for_one_size, compile_forward, keep_on_disk
from dit.errors import Notice


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, c: Tensor, *, shared: Tensor | None = None) -> Tensor:
        return self.linear(x) * c + (0 if shared is None else shared)


def called(layers: list[Layer], batch: int) -> Tensor:
    x, c = torch.ones(batch, 4, requires_grad=torch.is_grad_enabled()), torch.ones(batch, 4)
    for layer in layers:
        x = layer(x, c)
    return x


def test_all_layers_share_a_graph_a_size_with_gradients_and_one_for_all_sizes_without() -> None:
    layers, counter = [Layer() for _ in range(3)], CompileCounterWithBackend("eager")
    expected = {size: called(layers, size).detach() for size in (8, 2, 5, 7)}
    for layer in layers:
        compile_forward(layer, backend=counter, fullgraph=True)
    with torch.no_grad():  # a checkpoint's probe comes before the first training batch
        assert torch.equal(called(layers, 2), expected[2])
    assert counter.frame_count == 1
    called(layers, 8).sum().backward()
    assert counter.frame_count == 2
    with torch.no_grad():
        for size in (5, 8, 7):
            torch.testing.assert_close(called(layers, size), expected[size])
    called(layers, 8).sum().backward()
    assert counter.frame_count == 2
    sizes = [
        [
            n.meta["example_value"].shape[0]
            for n in g.graph.nodes
            if n.op == "placeholder" and n.name == "l_x_"
        ]
        for g in counter.graphs
    ]
    assert [isinstance(size[0], int) for size in sizes] == [False, True]  # the training batch's is static


@pytest.mark.parametrize("with_gradients", [True, False])
def test_compiled_layers_go_into_a_larger_graph(with_gradients: bool) -> None:
    layers, counter = [Layer() for _ in range(2)], CompileCounterWithBackend("eager")
    with torch.set_grad_enabled(with_gradients):
        expected = called(layers, 3)
        for layer in layers:
            compile_forward(layer, backend="eager")
        whole = torch.compile(lambda x, c: layers[1](layers[0](x, c), c), backend=counter, fullgraph=True)
        assert torch.equal(whole(torch.ones(3, 4), torch.ones(3, 4)), expected)
    assert counter.frame_count == 1


def test_another_size_is_another_graph_and_never_one_for_both() -> None:
    counter = CompileCounterWithBackend("eager")
    double = compile_for_one_size(lambda x: 2 * x, backend=counter)
    for size in (3, 4, 5):
        double(torch.ones(size))
    assert counter.frame_count == 3


def test_what_is_compiled_is_told_once_and_what_comes_again_is_warned_of_with_its_reason() -> None:
    said: list[str] = []
    watch = CompileWatch(said.append, is_main=True)
    double = compile_for_one_size(lambda x: 2 * x, backend="eager")
    double(torch.ones(3))
    assert watch.look("step") > 0
    double(torch.ones(4))
    watch.look("pictures")
    assert [line.split(" in ")[0] for line in said] == [
        "step: compiled 1 graph(s)",
        "pictures: compiled 1 graph(s)",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        double(torch.ones(3))
        assert watch.look("step") == 0
    double(torch.ones(5))
    with pytest.warns(Notice, match=r"step: torch compiled 1 graph\(s\) more .* expected [34], actual 5"):
        watch.look("step")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        double(torch.ones(6))
        assert watch.look("step") > 0  # counted all the same, and not told twice
    assert len(said) == 2


def test_rank_0_alone_warns() -> None:
    watch = CompileWatch(lambda text: None, is_main=False)
    double = compile_for_one_size(lambda x: 2 * x, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (3, 4):
            double(torch.ones(size))
            watch.look("step")


def test_seconds_are_those_of_compiling() -> None:
    before = Compiled.now()
    double = compile_for_one_size(lambda x: 2 * x, backend="eager")
    assert Compiled.now().since(before) == Compiled()
    double(torch.ones(3))
    first = Compiled.now().since(before)
    assert first.graphs == 1
    assert 0 < first.seconds < 60
    double(torch.ones(3))
    assert Compiled.now().since(before) == first


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The machine's temporary folder, where torch has not been told of a folder yet."""
    monkeypatch.setenv(
        compiling.FOLDER, "x"
    )  # so that it is as before afterwards, whatever is set in between
    monkeypatch.delenv(compiling.FOLDER)
    monkeypatch.setattr(compiling.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_folder_is_this_users_and_machines_and_stays_the_same(temporary: Path) -> None:
    folder = keep_on_disk()
    assert folder.parent == temporary / f"dit-compiled-{os.getuid()}"
    assert folder.parent.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777 == 0o700
    assert os.environ[compiling.FOLDER] == str(folder)
    del os.environ[compiling.FOLDER]
    assert keep_on_disk() == folder


def test_a_folder_that_was_named_is_taken(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiling.FOLDER, str(temporary / "mine"))
    assert keep_on_disk() == temporary / "mine"
    assert not list(temporary.iterdir())


def test_torchs_own_folder_was_named_by_nobody(temporary: Path) -> None:
    assert (
        cache_dir() == os.environ[compiling.FOLDER]
    )  # which it sets, as anything of torch's may have before a run
    assert keep_on_disk().parent.name.startswith("dit-compiled-")
    assert cache_dir() == str(keep_on_disk())


@pytest.mark.parametrize("how", ["writable", "link", "file"])
def test_a_folder_that_others_may_write_to_is_not_trusted(temporary: Path, how: str) -> None:
    place = temporary / f"dit-compiled-{os.getuid()}"
    if how == "writable":
        place.mkdir()
        place.chmod(0o777)
    elif how == "link":
        (temporary / "elsewhere").mkdir()
        place.symlink_to(temporary / "elsewhere")
    else:
        place.write_text("")
    with pytest.warns(Notice, match="kept for this process alone.*TORCHINDUCTOR_CACHE_DIR"):
        folder = keep_on_disk()
    assert place not in folder.parents
    assert folder.stat().st_mode & 0o777 == 0o700
