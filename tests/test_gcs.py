"""A workdir on Google Cloud Storage: a run there, killed and resumed, is the run on a disk.

Needs gcsfs and gcp-storage-emulator, and is skipped without them:

    pip install gcsfs gcp-storage-emulator

The emulator knows no conditions on writes: two processes that write one object at once are
not tested.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import test_runs
from test_processes import CONFIG_FILE, TESTS, free_port

from klear_jax import checkpoint, hf_weights

pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")
objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")

pytestmark = [
    test_runs.pytestmark,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Variables under which gs:// is a server of this machine."""
    download = objects.download

    def with_generation(request, response, storage, *args, **kwargs):
        """The real service says which generation of an object it sends; this one does not,
        and what orbax then writes names none."""
        download(request, response, storage, *args, **kwargs)
        if response.status < 300:
            names = request.params["bucket_name"], request.params["object_id"]
            response["x-goog-generation"] = storage.get_file_obj(*names)["generation"]

    monkeypatch.setattr(objects, "download", with_generation)
    port = free_port()
    server = emulator.create_server(
        "localhost", port, in_memory=True, default_bucket="bucket"
    )
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
    # Else gcsfs looks for credentials and asks the real service, for seconds each time.
    for protocol in ("GS", "GCS"):
        monkeypatch.setenv(f"FSSPEC_{protocol}_TOKEN", "anon")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    yield os.environ | {
        "TENSORSTORE_GCS_HTTP_URL": f"http://localhost:{port}",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path]),
    }
    server.stop()


def test_a_run_on_an_object_store_is_resumed(tmp_path, environment):
    import gcsfs

    test_runs.make_data(tmp_path / "data")
    text = CONFIG_FILE.format(data=str(tmp_path / "data"))
    (tmp_path / "config.py").write_text(text)
    command = [sys.executable, "-m", "klear_jax.train"]
    command += [f"--config={tmp_path / 'config.py'}", "--workdir=gs://bucket/run"]
    log = tmp_path / "log"

    def start():
        with log.open("w") as out:
            return subprocess.Popen(command, env=environment, stdout=out, stderr=out)

    files = gcsfs.GCSFileSystem(token="anon", skip_instance_cache=True)

    def listed():
        files.invalidate_cache()
        return [path.removeprefix("bucket/run/") for path in files.find("bucket/run")]

    process = start()
    deadline = time.monotonic() + 300
    while not any(path.startswith("checkpoints/3/") for path in listed()):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = start()
    assert process.wait(300) == 0, log.read_text()[-3000:]

    alone = tmp_path / "alone"
    config = test_runs.small_gppo(tmp_path / "data")
    config.evaluation.every = 0
    test_runs.start(config, alone)
    files.get("bucket/run/", str(tmp_path / "copy"), recursive=True)
    copy = pathlib.Path(tmp_path / "copy")
    if (copy / "run").exists():
        copy = copy / "run"
    lines, expected = (
        test_runs.without_times(test_runs.read_lines(one / "metrics.jsonl"))
        for one in (copy, alone)
    )
    assert [line["step"] for line in lines] == list(range(6))
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert list((copy / "tensorboard").iterdir())
    for step in range(6):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (copy / name).read_text() == (alone / name).read_text()

    params, config = checkpoint.load_model(alone)
    hf_weights.save("gs://bucket/model", params, config)
    loaded, same = hf_weights.load("gs://bucket/model", dtype=np.float32)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
