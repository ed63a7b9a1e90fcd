"""What MkDocs calls while it builds the documentation: links, generated parts, further pages."""

from pathlib import Path

from docs_links import DOCS, LinkSite
from docs_reference import command_reference, key_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = get_plugin_logger("docs")

# Lines of a page that are replaced while the site is built.
GENERATED = {
    "<!-- here: all keys -->": key_reference,
    "<!-- here: all commands -->": command_reference,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are files outside docs/."""
    for source, page in config.extra["further_pages"].items():
        path = _site(config).root / source
        if path.is_file():
            files.append(File.generated(config, page, content=path.read_text(encoding="utf-8")))
        else:
            log.warning("mkdocs.yml: extra.further_pages names %s, which is not there", source)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts in what is generated, and makes the links those of the site."""
    for mark, generate in GENERATED.items():
        if mark in markdown:
            markdown = markdown.replace(mark, generate())
    further = {page: source for source, page in config.extra["further_pages"].items()}
    source = further.get(page.file.src_uri, f"{DOCS}/{page.file.src_uri}")
    markdown, missing = _site(config).rewrite(markdown, source)
    for target in missing:
        log.warning("%s links to %s, which is not there", source, target)
    return markdown


def _site(config: MkDocsConfig) -> LinkSite:
    return LinkSite(
        root=Path(config.docs_dir).parent,
        repository=config.repo_url or "",
        branch=config.extra["branch"],
        pages=config.extra["further_pages"],
    )
