"""The rows of a manifest or of a plan, read by the words of its documentation and none of our code."""

from typing import Any


def worked_on(said: dict[str, Any]) -> list[dict[str, Any]]:
    """The matrices that are packed, or pruned."""
    return [row for row in said["matrices"] if row["format"] != "dense" or row.get("sparse")]


def dense(said: dict[str, Any]) -> dict[str, str]:
    """Why each of the others is left as it is."""
    return {
        row["name"]: row["reason"]
        for row in said["matrices"]
        if row["format"] == "dense" and not row.get("sparse")
    }


def unpruned(said: dict[str, Any]) -> dict[str, str]:
    """Why each of these is packed and not 2:4 while others are."""
    return {
        row["name"]: row["reason"] for row in said["matrices"] if row["format"] != "dense" and "reason" in row
    }


def is_sparse(said: dict[str, Any]) -> bool:
    """Whether any matrix is 2:4."""
    return any(row.get("sparse") for row in said["matrices"])


def earlier(said: dict[str, Any]) -> dict[str, Any]:
    """The manifest as versions before the record wrote it: lists, and words for all."""
    known = ("name", "k", "n", "error", "damping", "rounded_to_nearest")
    return {key: value for key, value in said.items() if key != "matrices"} | {
        "linears": [{key: row[key] for key in known if key in row} for row in worked_on(said)],
        "sparsity": "2:4" if is_sparse(said) else None,
        "unpruned": unpruned(said),
        "dense": dense(said),
        "recipe": {key: said["recipe"][key] for key in said["recipe"] if key not in ("bits", "overrides")}
        | {"group_size": next(row["group_size"] for row in worked_on(said))},
    }
