"""Sets of images to encode: folders, tars, Parquet, ImageNet as it is downloaded; and how they are cropped."""
