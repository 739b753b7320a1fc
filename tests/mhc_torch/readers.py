"""What experiment trackers wrote, read back from their own files.

Scalars as {key: {step: value}}, pictures as {step: image}.
"""

import csv
import io
import json
import struct
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

Scalars = dict[str, dict[int, float]]


def image(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def tensorboard(folder: Path) -> tuple[Scalars, dict[int, np.ndarray]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    pictures = {e.step: image(e.encoded_image_string) for tag in events.Tags()["images"] for e in events.Images(tag)}
    return scalars, pictures


def csv_file(folder: Path, key: str) -> tuple[Scalars, dict[int, np.ndarray]]:
    scalars: Scalars = defaultdict(dict)
    with open(folder / "metrics.csv") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    scalars[name][int(row["step"])] = float(value)
    pictures = {
        int(path.stem.removeprefix("step=")): image(path.read_bytes()) for path in (folder / key).glob("step=*.png")
    }
    return dict(scalars), pictures


def wandb_offline(folder: Path, key: str) -> tuple[Scalars, dict[int, np.ndarray]]:
    from wandb.proto import wandb_internal_pb2

    (run,) = folder.glob("wandb/offline-run-*")
    (log,) = run.glob("*.wandb")
    scalars: Scalars = defaultdict(dict)
    pictures = {}
    for data in _leveldb_records(log.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {(item.key, *item.nested_key): json.loads(item.value_json) for item in record.history.item}
        step = row.get(("", "trainer/global_step"), row.get(("trainer/global_step",)))
        for path, value in row.items():
            if isinstance(value, int | float) and step is not None:
                scalars["".join(path)][step] = value
        for path in row.get(("", key, "filenames"), []):
            pictures[step] = image((run / "files" / path).read_bytes())
    return dict(scalars), pictures


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of the LevelDB log format after W&B's header of seven bytes (its first block is that much shorter)."""
    position, record = 7, b""
    while position + 7 <= len(data):
        if (left := -position % 2**15) < 7 and left:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield record
            record = b""


def mlflow_store(uri: str, run_id: str, scratch: Path) -> tuple[Scalars, dict[int, np.ndarray]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    scalars = {
        name: {m.step: m.value for m in client.get_metric_history(run_id, name)}
        for name in client.get_run(run_id).data.metrics
    }
    pictures = {}
    for artifact in client.list_artifacts(run_id, "images"):
        if artifact.path.endswith(".png"):
            step = int(artifact.path.split("+step+")[1].split("+")[0])
            pictures[step] = image(Path(client.download_artifacts(run_id, artifact.path, str(scratch))).read_bytes())
    return scalars, pictures


def mlflow_status(uri: str, run_id: str) -> str:
    from mlflow.tracking import MlflowClient

    return str(MlflowClient(uri).get_run(run_id).info.status)


def comet_archive(folder: Path, key: str) -> tuple[Scalars, dict[int, np.ndarray]]:
    (archive,) = folder.glob("*.zip")
    scalars: Scalars = defaultdict(dict)
    pictures = {}
    with zipfile.ZipFile(archive) as files:
        for line in files.read("messages.json").splitlines():
            message = json.loads(line)
            payload = message["payload"]
            if message["type"] == "metric_msg":
                metric = payload["metric"]
                scalars[metric["metricName"]][metric["step"]] = metric["metricValue"]
            elif message["type"] == "file_upload" and (payload["additional_params"] or {}).get("figName") == key:
                pictures[payload["additional_params"]["step"]] = image(files.read(payload["file_path"]))
    return dict(scalars), pictures


def comet_failed(folder: Path) -> bool:
    (archive,) = folder.glob("*.zip")
    with zipfile.ZipFile(archive) as files:
        return bool(json.loads(files.read("experiment.json"))["customer_error_reported"])


def clearml_session(folder: Path, key: str) -> tuple[Scalars, dict[int, np.ndarray]]:
    (archive,) = folder.glob("offline/*.zip")
    scalars: Scalars = defaultdict(dict)
    pictures = {}
    with zipfile.ZipFile(archive) as files:
        for line in files.read("metrics.jsonl").splitlines():
            for event in json.loads(line):
                if event["type"] == "training_stats_scalar":
                    assert event["metric"] == event["variant"]
                    scalars[event["metric"]][event["iter"]] = event["value"]
                elif event["metric"] == key:
                    pictures[event["iter"]] = image(files.read(f"data/{event['key']}"))
    return dict(scalars), pictures


def tensorboard_parameters(folder: Path) -> dict[str, Any]:
    return _flat(yaml.safe_load((folder / "hparams.yaml").read_text()))


def wandb_parameters(folder: Path) -> dict[str, Any]:
    from wandb.proto import wandb_internal_pb2

    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    parameters: dict[str, Any] = {}
    for data in _leveldb_records(log.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        parameters |= {item.key: json.loads(item.value_json) for item in record.config.update}
    return _flat(parameters)


def mlflow_parameters(uri: str, run_id: str) -> dict[str, Any]:
    from mlflow.tracking import MlflowClient

    return dict(MlflowClient(uri).get_run(run_id).data.params)


def comet_parameters(folder: Path) -> dict[str, Any]:
    (archive,) = folder.glob("*.zip")
    with zipfile.ZipFile(archive) as files:
        messages = [json.loads(line) for line in files.read("messages.json").splitlines()]
    found = [message["payload"]["param"] for message in messages if message["type"] == "parameter_msg"]
    return {param["paramName"]: param["paramValue"] for param in found if param["source"] == "manual"}


def clearml_parameters(folder: Path) -> dict[str, Any]:
    (archive,) = folder.glob("offline/*.zip")
    with zipfile.ZipFile(archive) as files:
        section = json.loads(files.read("task.json")).get("hyperparams", {}).get("General", {})
    return {name: parameter["value"] for name, parameter in section.items()}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
