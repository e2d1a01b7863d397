"""Dataset directories: opened, imported from public formats, simulated."""

from recsys.data.dataset import Dataset
from recsys.data.importers import FORMATS, import_dataset
from recsys.data.simulate import simulate
from recsys.data.write import DatasetWriter, ImportReport, write_dataset

__all__ = ["FORMATS", "Dataset", "DatasetWriter", "ImportReport", "import_dataset", "simulate", "write_dataset"]
