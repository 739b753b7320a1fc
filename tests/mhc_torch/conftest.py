"""What tests of several files share."""

from pathlib import Path

import pytest

from mhc_torch import native


@pytest.fixture(scope="session")
def compiled_nodes() -> Path:
    """The nodes of stacks in C++. Where there is a compiler they must compile."""
    if native.compiler() is None:
        pytest.skip("there is no C++ compiler")
    return native.build()


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs, to be copied: MLflow takes seconds to make its tables."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path
