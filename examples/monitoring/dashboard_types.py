"""Print the dashboard as TypeScript, so that Grafana's own types check it.

  npm install --no-save @grafana/schema@13.2.3 typescript
  python dashboard_types.py > dashboard.ts
  npx tsc --noEmit --strict --skipLibCheck --target es2022 --module esnext --moduleResolution bundler dashboard.ts

The compiler names every field that Grafana does not know or needs, and every value that it does not take.
"""

from __future__ import annotations

import json
from typing import Any

from check_dashboard import DASHBOARD

TYPES = "@grafana/schema/dist/esm/raw"
PANELS = {"stat": "Stat", "timeseries": "TimeSeries"}  # what Grafana calls the types of their options
# JSON has an enumeration's value where TypeScript wants its name
LOOSE = """
type Loose<T> = T extends string ? `${T}`
  : T extends boolean | null | undefined ? T
  : T extends number ? (number extends T ? number : `${T}` extends `${infer N extends number}` ? N : T)
  : T extends (infer U)[] ? Loose<U>[]
  : T extends object ? { [K in keyof T]: Loose<T[K]> } : T;
"""


def main() -> None:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = dashboard.pop("panels")
    print(f'import type {{ Dashboard, Panel, RowPanel }} from "{TYPES}/dashboard/x/Dashboard_types.gen";')
    for name, title in PANELS.items():
        print(f'import type * as {name} from "{TYPES}/composable/{name}/panelcfg/x/{title}PanelCfg_types.gen";')
    print(LOOSE)
    declare("dashboard", "Omit<Dashboard, 'panels'>", dashboard)
    for panel in panels:
        number, kind = panel["id"], panel["type"]
        if kind == "row":
            declare(f"row{number}", "RowPanel", panel)
            continue
        declare(f"options{number}", f"Partial<{kind}.Options>", panel.pop("options", {}))
        custom = panel["fieldConfig"]["defaults"].pop("custom", None)
        if custom is not None:
            declare(f"custom{number}", f"Partial<{kind}.FieldConfig>", custom)
        declare(f"panel{number}", "Panel", panel)


def declare(name: str, kind: str, value: Any) -> None:
    print(f"export const {name}: Loose<{kind}> = {json.dumps(value)};")


if __name__ == "__main__":
    main()
