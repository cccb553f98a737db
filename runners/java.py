"""Find the Java that our servers run on."""

import os
import re
import shutil
import subprocess

from schemas.errors import CampusSyncError

_VERSIONS = (11, 17)  # What Flink 1.19 runs on; tested with 17.


class JavaMissing(CampusSyncError):
    """There is no Java, or not of a version that serves; with the remedy."""


def find_java(who: str, java: str | None = None) -> str:
    """Returns the path of a Java that `who` runs on: `java`, $JAVA_HOME's, or the PATH's.

    Raises:
      JavaMissing: there is none, or it is of another version.
    """
    home = os.environ.get("JAVA_HOME")
    wanted = java or (os.path.join(home, "bin", "java") if home else "java")
    path = shutil.which(wanted)
    remedy = (
        "Remedy: install Java 17 (Debian: `apt-get install openjdk-17-jre-headless`; RHEL: "
        "`dnf install java-17-openjdk-headless`) and name it by --java or JAVA_HOME."
    )
    if path is None:
        raise JavaMissing(f"{who} needs Java 17 and `{wanted}` is not there. {remedy}")
    answer = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=30)
    found = re.search(r'version "(?:1\.)?(\d+)', answer.stderr + answer.stdout)
    version = int(found[1]) if found else 0
    if version not in _VERSIONS:
        raise JavaMissing(f"{who} needs Java 17 and {path} is version {version or '?'}. {remedy}")
    return path
