"""Videos while a run trains: `wanprep decode --watch`, a process of stage 1 that `fit` starts and ends.

The trainer itself never loads the VAE; what it samples are latents under RUN/samples.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from shards.console import LOG
from shards.errors import UserError
from shards.files.tensor_files import SAMPLES_FOLDER
from shards.files.write_file import no_pipe
from train.config.sampling import SampleConfig

END_SECONDS = 10.0


class Preview:
    """The watching process, from the beginning of a run to `close`. Without `sample.decode` it does nothing."""

    def __init__(self, config: SampleConfig | None, run: Path) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._ending = False
        if config is None or config.decode is None:
            return
        if not Path(config.decode).is_file():
            raise UserError(f"sample.decode: {config.decode}: no such file", expected="the config of `wanprep`")
        # -P: a file of the user's called preprocess.py must not be what runs.
        self._command = [sys.executable, "-P", "-m", "preprocess.cli", "decode", "--watch", str(run), "-c"]
        self._command += [config.decode, "-o", f"encoders.device={config.decode_device}"]
        self._log = run / "logs" / "decode.log"
        # A session of its own: Ctrl-C asks the run for a checkpoint, and the watch ends with the run.
        self._child = self._start("--with-parent")
        threading.Thread(target=self._report_end, args=(self._child,), daemon=True).start()
        LOG.info("videos of the samples: %s (%s)", run / SAMPLES_FOLDER, self._log)

    def _start(self, option: str) -> subprocess.Popen[bytes]:
        with open(self._log, "ab", opener=no_pipe) as log:
            return subprocess.Popen(
                [*self._command, option], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _report_end(self, child: subprocess.Popen[bytes]) -> None:
        code = child.wait()
        if not self._ending:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
            LOG.warning("no more videos: `wanprep decode` ended with %d: %s", code, lines[-1] if lines else "")

    def finish(self) -> None:
        """Decode what is left at the end of a run, and wait for it."""
        if self._child is None:
            return
        self.close()
        LOG.info("decoding the last samples")
        self._child = self._start("--once")
        try:
            code = self._child.wait()
        finally:
            self.close()  # after Ctrl-C it is still at work
        if code:
            LOG.warning("some samples have no video: `wanprep decode` ended with %d, see %s", code, self._log)

    def __enter__(self) -> Preview:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the watch at once."""
        self._ending = True
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
