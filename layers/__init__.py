"""Import this as ``moe_ep.layers``: the folder is linked into the package."""

if __name__ == "layers":
    raise ImportError("import moe_ep.layers, not the top-level folder layers: run from elsewhere or install the package")
