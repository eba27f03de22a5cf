"""A certificate authority of a test's own, by the openssl program."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class Pair:
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Authority:
    directory: Path

    @property
    def root(self) -> Path:
        return self.directory / "root.crt"

    def issue(self, name: str, *alternatives: str, into: Pair | None = None) -> Pair:
        """A certificate for a subject; `alternatives` are like DNS:localhost and IP:127.0.0.1."""
        pair = into or Pair(self.directory / f"{name}.crt", self.directory / f"{name}.key")
        request, extension = self.directory / f"{name}.csr", self.directory / f"{name}.ext"
        extension.write_text(f"subjectAltName={','.join(alternatives)}\n" if alternatives else "")
        _openssl("req", "-new", "-nodes", *_KEY, "-keyout", pair.key, "-out", request, "-subj", f"/CN={name}")
        pair.key.chmod(0o600)
        root_key = self.directory / "root.key"
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.root, "-CAkey", root_key, "-CAcreateserial"),
            *("-days", "2", "-out", pair.certificate, "-extfile", extension),
        )
        return pair

    def revoke(self, pair: Pair) -> Path:
        """The list of what is revoked: this one."""
        (self.directory / "index.txt").touch()
        settings = self.directory / "ca.cnf"
        settings.write_text(
            f"[ca]\ndefault_ca=own\n[own]\ndatabase={self.directory}/index.txt\ndefault_md=sha256\ndefault_crl_days=2\n"
        )
        common = ("-config", settings, "-cert", self.root, "-keyfile", self.directory / "root.key")
        _openssl("ca", *common, "-revoke", pair.certificate)
        _openssl("ca", *common, "-gencrl", "-out", self.directory / "root.crl")
        return self.directory / "root.crl"


_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


def make_authority(directory: Path) -> Authority:
    authority = Authority(directory)
    _openssl(
        *("req", "-x509", "-new", "-nodes", *_KEY, "-keyout", directory / "root.key", "-out", authority.root),
        *("-days", "2", "-subj", "/CN=a test's authority"),
    )
    return authority


def _openssl(*words: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("authority"))
