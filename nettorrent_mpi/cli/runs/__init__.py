"""Commands that read run folders while a run goes on or after it: `runs`, `watch`, `report`, and exports of metrics."""
