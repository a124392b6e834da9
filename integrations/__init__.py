"""Import this as ``moe_ep.integrations``: the folder is linked into the package."""

if __name__ == "integrations":
    raise ImportError(
        "import moe_ep.integrations, not the top-level folder integrations: run from elsewhere or install the package"
    )
