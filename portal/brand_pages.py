"""What a site calls its own, as pages and files: logo, stylesheet, terms. Everybody may see them."""

from __future__ import annotations

from flask import Blueprint, Response, render_template

from deskfleet.portal.brand import stylesheet
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.languages import language
from deskfleet.portal.services import services
from deskfleet.portal.web import public

brand = Blueprint("brand", __name__)


@brand.get("/brand/<version>/logo")
@public
def logo(version: str) -> Response:
    """The site's logo. Whatever an SVG holds, it runs nothing and loads nothing, even when it is opened by itself."""
    found = services().settings.brand
    if found.logo is None or version != found.version:
        raise Problem(Refused.NOT_FOUND)
    response = Response(found.logo.content, mimetype=found.logo.mimetype)
    response.headers["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
    return response


@brand.get("/brand/<version>/accent.css")
@public
def accent(version: str) -> Response:
    """The site's colour."""
    found = services().settings.brand
    if not found.accent or version != found.version:
        raise Problem(Refused.NOT_FOUND)
    return Response(stylesheet(found.accent), mimetype="text/css")


@brand.get("/terms")
@public
def terms() -> str:
    """The site's terms and conditions."""
    text = services().settings.brand.terms_in(language())
    if not text:
        raise Problem(Refused.NOT_FOUND)
    return render_template("terms.html", paragraphs=[part.strip() for part in text.split("\n\n") if part.strip()])
