"""Classes of other code bases: `from polyak.compat.yolov5 import ModelEMA`, and so on."""
