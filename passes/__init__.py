"""Graph in, graph out: the passes of skipc, one per file, in the order of :mod:`skipc.passes.pipeline`.

Invariants that every pass keeps, checked by the manager after each one:

* the graph lints, and every node carries ``meta["example_value"]`` (or none, as its original did);
* placeholders and outputs stay as they were: number, order, dtypes, shapes;
* a write to an input is never dropped or moved across a read of the same storage;
* Dynamo's own graph is never touched: the manager works on a copy.
"""
