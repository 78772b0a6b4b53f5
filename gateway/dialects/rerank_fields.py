"""Rerank fields: the fields of a rerank request, as every engine that ranks takes them."""

from typing import Any

from gateway.errors import BadRequest


def fit_documents(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with each document as a text. Raises BadRequest that names the field.

    Some APIs hold a document as an object with a `text`. Images are refused, because an engine would fetch them.
    llama.cpp answers a `top_n` below 1 with a 500.
    """
    query, documents, most = fields.get("query"), fields["documents"], fields.get("top_n")
    if not isinstance(query, str) or not query:
        raise BadRequest("'query' must be a string that is not empty.", param="query")
    if not isinstance(documents, list) or not documents:
        raise BadRequest("'documents' must be a list with at least one text.", param="documents")
    if most is not None and (type(most) is not int or most < 1):
        raise BadRequest("'top_n' must be a whole number from 1 on. Leave it out to get all documents.", param="top_n")
    return fields | {"documents": [_text(it, f"documents[{index}]") for index, it in enumerate(documents)]}


def _text(document: Any, where: str) -> str:
    text = document.get("text") if isinstance(document, dict) and document.keys() == {"text"} else document
    if isinstance(text, str):
        return text
    raise BadRequest(f"'{where}' must be a text, or an object with only a 'text'.", param=where)
