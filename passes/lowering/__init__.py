"""From the transformed graph to something that runs. One module per lowering; ``outline`` is the default."""
