"""Published checkpoints as runs and runs as published checkpoints: `import_run`, `export_run`, `load_pretrained`."""

from hybridlm.interop.runs import export_run as export_run
from hybridlm.interop.runs import import_run as import_run
from hybridlm.interop.runs import load_pretrained as load_pretrained
