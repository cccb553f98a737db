"""Keys by reference: 32 random bytes in base64, in a file or a variable, never in a setting."""

import base64
import binascii
import errno
import os
import pathlib
import stat
import tempfile

from schemas.errors import ConfigError

KEY_BYTES = 32

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class SecretKey:
    """The key that a reference names: read at first use, kept in this process only.

    It is in no repr, pickle or error.

    Args:
      setting: where the reference stands, for errors.
      ref: `file:PATH` or `env:NAME`.
      loss: what cannot be done any more without the key.
      base: the folder that a relative PATH starts from.

    Raises:
      ConfigError: the reference is neither.
    """

    def __init__(self, setting: str, ref: str, loss: str, base: str | pathlib.Path = "."):
        kind, _, name = ref.partition(":")
        if kind not in ("file", "env") or not name:
            # A reference that is neither is perhaps the key itself: it is not repeated.
            raise ConfigError(
                f"{setting}: is neither `file:PATH` nor `env:NAME`. "
                "Remedy: give a reference to the key, never the key."
            )
        self.ref = ref
        self._kind, self._name, self._loss = kind, name, loss
        self._base = pathlib.Path(base)
        self._key: bytes | None = None

    def __repr__(self) -> str:
        return f"SecretKey({self.ref!r})"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_key": None}

    @property
    def path(self) -> pathlib.Path | None:
        """The file that is referred to, None for a variable."""
        return self._base / self._name if self._kind == "file" else None

    def load(self) -> bytes:
        """Returns the key.

        Raises:
          ConfigError: it is not there, is not private, or is no key; with the remedy.
        """
        if self._key is None:
            self._key = _decode(self._read(), self.ref)
        return self._key

    def _read(self) -> str:
        if self.path is None:
            if self._name not in os.environ:
                raise ConfigError(
                    f"{self.ref}: the variable is not set. Remedy: "
                    f'export {self._name}="$(head -c {KEY_BYTES} /dev/urandom | base64)", '
                    f"and keep the key: {self._loss}."
                )
            return os.environ[self._name]
        path = self.path
        try:
            with path.open(encoding="ascii") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & stat.S_IRWXO:
                    raise ConfigError(
                        f"{path}: everybody may read this key. Remedy: chmod 600 {path}"
                    )
                return file.read()
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: no such key file. Remedy: "
                f"(umask 077; head -c {KEY_BYTES} /dev/urandom | base64 > {path}), "
                f"and keep a copy: {self._loss}."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{path}: {error.strerror}. Remedy: let the user of the sync job read it."
            ) from None
        except UnicodeDecodeError:
            raise _not_a_key(self.ref) from None


def write_key(path: str | pathlib.Path) -> None:
    """Writes a new random key to `path`, readable by its owner only.

    Raises:
      FileExistsError: there is a file already, which is never overwritten.
      ConfigError: there is no such folder, nobody may write to it, or its disk is full: there
        is no file then.
    """
    path = pathlib.Path(path)
    try:
        # Whole before it has its name: an empty file on a full disk would be no key for ever.
        handle, unnamed = tempfile.mkstemp(".new", f".{path.name}.", path.parent)
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                os.fchmod(handle, 0o600)
                file.write(base64.b64encode(os.urandom(KEY_BYTES)).decode() + "\n")
                file.flush()
                os.fsync(handle)
            os.link(unnamed, path)
        finally:
            os.unlink(unnamed)
        _sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        remedy = "make room" if error.errno in _NO_ROOM else "choose a folder to write to"
        raise ConfigError(f"{path}: {error.strerror}. Remedy: {remedy}.") from None


def _sync_folder(path: pathlib.Path) -> None:
    """Makes the names in a folder outlast a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _decode(text: str, ref: str) -> bytes:
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise _not_a_key(ref) from None
    if len(key) != KEY_BYTES:
        raise _not_a_key(ref)
    return key


def _not_a_key(ref: str) -> ConfigError:
    return ConfigError(
        f"{ref}: does not hold {KEY_BYTES} bytes in base64. "
        f"Remedy: make a key with `head -c {KEY_BYTES} /dev/urandom | base64`."
    )
