"""Seal refused changes: what they hold is encrypted, what an engineer needs stays readable."""

import collections.abc
import hashlib
import json
import os
import pathlib

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from schemas.batches import DeadLetter, Reject
from schemas.errors import ConfigError, DeadLetterDamagedError
from schemas.positions import Position
from transforms.secret_key import SecretKey, write_key

_NONCE_BYTES = 12
_FORMAT = b"\x01"  # Of `sealed`: format, nonce, ciphertext with tag.


class Sealer:
    """Seals and opens dead letters with the key that a reference names.

    Holds the reference; the key is read at first use, kept in this process only, and is in
    no repr, pickle or error. AES-256-GCM; letter id and reason are authenticated with the
    content, so that neither can be moved to another letter.

    Args:
      key_ref: `file:PATH` or `env:NAME`; the key is 32 bytes in base64.
      base: the folder that a relative PATH starts from.
      random_bytes: source of nonces, cryptographically random.
    """

    def __init__(
        self,
        key_ref: str,
        base: str | pathlib.Path = ".",
        random_bytes: collections.abc.Callable[[int], bytes] = os.urandom,
    ):
        loss = "without it no dead letter can be opened"
        self._secret = SecretKey("dead_letter_key", key_ref, loss, base)
        self._random_bytes = random_bytes

    def __repr__(self) -> str:
        return f"Sealer({self._secret.ref!r})"

    @property
    def key_id(self) -> str:
        """Names the key without telling it: 16 hex digits of a SHA-256."""
        return hashlib.sha256(b"campus-sync dead letter key\0" + self._secret.load()).hexdigest()[
            :16
        ]

    def seal(self, reject: Reject, link: str, kind: str = "row") -> DeadLetter:
        """Returns `reject` as a letter of `link`; the id repeats, the ciphertext does not."""
        letter_id = letter_id_of(link, reject.src_table, reject.position, reject.op, kind)
        nonce = self._random_bytes(_NONCE_BYTES)
        content = json.dumps({**_in_the_open(reject), "row": reject.row}, sort_keys=True).encode()
        box = AESGCM(self._secret.load()).encrypt(nonce, content, _bound(letter_id, reject.reason))
        return DeadLetter(
            letter_id=letter_id,
            key_id=self.key_id,
            sealed=_FORMAT + nonce + box,
            **_in_the_open(reject),
        )

    def open(self, letter: DeadLetter) -> Reject:
        """Returns what `seal` was given.

        Raises:
          ConfigError: the letter was sealed with another key; both are named by their ids.
          DeadLetterDamagedError: the letter is not as it was sealed.
        """
        if letter.key_id != self.key_id:
            raise ConfigError(
                f"{self._secret.ref}: is key {self.key_id}, the dead letter needs key "
                f"{letter.key_id}. Remedy: point dead_letter_key to the key that it was sealed "
                "with."
            )
        sealed = bytes(letter.sealed)
        if sealed[:1] != _FORMAT:
            raise DeadLetterDamagedError
        nonce, box = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            text = AESGCM(self._secret.load()).decrypt(
                nonce, box, _bound(letter.letter_id, letter.reason)
            )
        except (InvalidTag, ValueError):
            raise DeadLetterDamagedError from None
        content = json.loads(text)
        position = Position(content.pop("lsn"), content.pop("seq"))
        reject = Reject(position=position, **content)
        if any(getattr(letter, name) != value for name, value in _in_the_open(reject).items()):
            raise DeadLetterDamagedError
        return reject


def letter_id_of(link: str, src_table: str, position: Position, op: int, kind: str = "row") -> str:
    """Returns the letter's id, 64 hex digits: the same change refused again has the same."""
    place = [link, src_table, *position, int(op), kind]
    return hashlib.sha256(json.dumps(place).encode()).hexdigest()


def make_key(path: str | pathlib.Path) -> None:
    """Writes a new random key to `path`, readable by its owner only.

    Raises:
      ConfigError: there is a file already, which is never overwritten, or no such folder.
    """
    try:
        write_key(path)
    except FileExistsError:
        raise ConfigError(
            f"{path}: exists already. Remedy: use it, or choose another name; "
            "letters sealed with it can be opened with no other key."
        ) from None


def _in_the_open(reject: Reject) -> dict:
    lsn, seq = reject.position
    return {
        "src_table": reject.src_table,
        "lsn": lsn,
        "seq": seq,
        "op": int(reject.op),
        "commit_us": reject.commit_us,
        "reason": reject.reason,
        "column": reject.column,
    }


def _bound(letter_id: str, reason: str) -> bytes:
    return (letter_id + reason).encode()  # The id is 64 digits, so the border is plain.
