"""What tests do with stores and disks: close them quietly, fork, and file systems of their own."""

import os
import pickle
import signal
import subprocess
import traceback
import warnings
from pathlib import Path


def run_in_fork(function, *arguments):
    """Call a function in a fork of this process.

    Return what it returned or raised, or None if it died on the way; and the signal that it died of, or 0.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 and later: other threads do not survive it
        pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(60)  # a child that hangs must not outlive the test
            os.close(reader)
            try:
                answer = function(*arguments)
            except BaseException as error:
                error.add_note(f"in a fork: {traceback.format_exc()}")
                answer = error
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(pickle.dumps(answer))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    return pickle.loads(answer) if answer else None, os.WTERMSIG(status)


class SmallDisk:
    """A small file system of its own, and a file that takes up room on it.

    Parameters
    ----------
    kind : {"ext4", "tmpfs"}
    folder : Path
        Where it is made: an image and the place of its mount.
    nbytes : int

    Raises
    ------
    subprocess.CalledProcessError, OSError
        It cannot be made here; mounting needs root.
    """

    def __init__(self, kind, folder, nbytes):
        from shardemb.storage import files

        self.place = Path(folder) / kind
        self.place.mkdir()
        self._ballast = self.place / "ballast"
        image = Path(folder) / "disk.img"
        commands = [["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", self.place]]
        if kind == "ext4":
            files.create_sparse(image, nbytes)
            # All of it is for everybody: what is kept for root would be room that no ballast takes.
            commands = [["mkfs.ext4", "-q", "-m", "0", image], ["mount", "-o", "loop", image, self.place]]
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
        if kind == "ext4":
            (self.place / "lost+found").rmdir()

    def room(self):
        """Bytes that are free."""
        found = os.statvfs(self.place)
        return found.f_bavail * found.f_frsize

    def leave(self, nbytes):
        """Take up all room but about so many bytes."""
        with self._ballast.open("ab") as file:
            step = self.room() - nbytes
            if step < 0:
                file.truncate(max(0, file.tell() + step))
            while step >= 1024:
                try:
                    os.posix_fallocate(file.fileno(), file.tell(), step)
                    file.seek(0, os.SEEK_END)
                except OSError:
                    step //= 2
                step = min(step, self.room() - nbytes)

    def make_room(self):
        """Give back all room that the ballast takes."""
        self._ballast.unlink(missing_ok=True)

    def unmount(self):
        """Take the file system away."""
        subprocess.run(["umount", "--lazy", self.place], check=True)


def close_quietly(store):
    """Close a store without its warning about changes that the test did not commit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        store.close()
