"""The extension archive that CloudStack imports: the executable and manifest.yaml."""

from __future__ import annotations

import zipfile
from pathlib import Path

from package.product import ROOT, Product
from package.tree import Papers

MANIFEST = Path(__file__).with_name("manifest.yaml")


def manifest(product: Product, url: str) -> str:
    """The text of manifest.yaml for this product, whose archive is published below ``url``. Raises SystemExit."""
    head, _, text = MANIFEST.read_text().partition("\n")
    filled = {"@VERSION@": product.version, "@URL@": f"{url.rstrip('/')}/", "@REFS@": name_of(product)}
    for name, value in filled.items():
        if name not in text or name not in head:
            raise SystemExit(f"release: {MANIFEST} has no {name}")
        text = text.replace(name, value)
    return text


def name_of(product: Product) -> str:
    """The name of the archive, without ``.zip``."""
    return f"netloom-{product.build}-extension"


def write(product: Product, papers: Papers, url: str, dist: Path) -> list[Path]:
    """Write the archive, and the manifest for an import; their paths. The same product gives the same bytes."""
    text = manifest(product, url)
    alone = dist / f"netloom-{product.build}-manifest.yaml"
    alone.write_text(text)
    target = dist / f"{name_of(product)}.zip"
    top = f"netloom-{product.version}"  # CloudStack removes the first directory of each name
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        _add(archive, f"{top}/LICENSE", (ROOT / "LICENSE").read_bytes(), 0o644, product)
        _add(archive, f"{top}/THIRD-PARTY-LICENSES", papers.licences.encode(), 0o644, product)
        _add(archive, f"{top}/manifest.yaml", text.encode(), 0o644, product)
        _add(archive, f"{top}/netloom", product.executable.read_bytes(), 0o755, product)
    return [target, alone]


def _add(archive: zipfile.ZipFile, name: str, content: bytes, mode: int, product: Product) -> None:
    it = zipfile.ZipInfo(name, product.time.timetuple()[:6])
    it.create_system = 3  # Unix: the mode below counts
    it.external_attr = (0o100000 | mode) << 16
    it.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(it, content)
