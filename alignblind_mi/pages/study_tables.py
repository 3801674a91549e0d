"""The tables of a study's report: saved rows -> summaries with n, interval and invalid share. Does NOT know how a table is shown."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from alignblind_mi.borders.reading import is_file, read_object
from alignblind_mi.errors import ResultError
from alignblind_mi.measures.awareness import blind_interval, n_readings, readings_of, selfie_table, summarise_readings
from alignblind_mi.measures.controls import less_controls
from alignblind_mi.measures.mitigation import comparison_table, steering_names
from alignblind_mi.mitigations.lora_settings import LAYER_GROUPS, layers_text
from alignblind_mi.pages.saved_study import ROLES, Study
from alignblind_mi.statistics.log_odds import improbable_share, outcomes_table
from alignblind_mi.statistics.paired import corrected, paired_differences
from alignblind_mi.statistics.rates import column_interval, position_effect, summarise
from alignblind_mi.studies.audit import alignment_claims, methods_opening, rows_by, software, treatment_claim
from alignblind_mi.studies.parts import INSTRUMENTS, MATCHED_NOISE, NOISE
from alignblind_mi.studies.qualified import instruments_by_role

QUESTION = "paper"    # the interpretation question that treatments are compared with
POOLED = "pooled"


def competence_table(study: Study) -> pd.DataFrame:
    """What each model can do, untreated and under every treatment that was asked: see `measures.competence.competence_table`."""
    asked = [(role, "untreated", one) for role, one in study.qualified.items()]
    asked += [("aligned", name, one) for name in lora_parts(study) if (one := study.competence_of(name)) is not None]
    return pd.concat([one.competence.assign(role=role, label=name.replace("lora_", "LoRA ")) for role, name, one in asked],
                     ignore_index=True) if asked else pd.DataFrame()


def qualified_table(study: Study) -> pd.DataFrame:
    """Which instruments read each model, and where they place the ambiguous prompts: see `studies.qualified.Qualification`."""
    return instruments_by_role(study.qualified)


def both_outcomes_table(study: Study) -> pd.DataFrame:
    """Text and probability side by side, a row a role and kind: see `log_odds.outcomes_table`."""
    table = outcomes_table(study.as_measured(f"behaviour_{role}" for role in ROLES), by=("role",))
    return table.assign(leads=[study.lead[str(kind)] for kind in table["kind"]])


def behaviour_table(study: Study) -> pd.DataFrame:
    """One row per role, kind and category (and pooled), published design: counts, rate, intervals, bounds, mean log-odds."""
    rows = study.rows(f"behaviour_{role}" for role in ROLES)
    table = summarised(rows, ("role", "kind", "category"))
    pooled = summarised(rows, ("role", "kind")).assign(category=POOLED)
    return _ordered(pd.concat([table, pooled], ignore_index=True), kind=("implicit", "explicit"),
                    category=(*study.concept.categories, POOLED), role=ROLES)


def position_table(study: Study) -> pd.DataFrame:
    """One row per design, role and template: association beside position; in the published design they cannot be told apart."""
    rows = study.rows(f"{design}_{role}" for design in ("balanced", "behaviour") for role in ROLES)
    table = position_effect(rows, by=("design", "role"))
    table["invalid_share"] = 1 - table["valid"] / table["n"]
    return _ordered(table, design=("balanced", "published"), template=[template.name for template in study.concept.implicit], role=ROLES)


def curves_table(study: Study) -> pd.DataFrame:
    """One row per question, role, sense and source layer: mean change of the sense word's probability, its interval, n readings."""
    rows = readings_in(study)
    records = []
    for (question, role, layer), group in rows.groupby(["interpretation", "role", "layer"], sort=False):
        for side, sense in (("group", study.concept.group_sense), ("other", study.concept.other_sense)):
            low, high = blind_interval(group, f"d_{side}")
            records.append({"question": question, "role": role, "sense": sense, "word": study.concept.senses[sense].word, "layer": layer,
                            "n": len(group), "mean": group[f"d_{side}"].mean(), "low": low, "high": high,
                            "unpatched": group[f"base_{side}"].mean()})
    return pd.DataFrame.from_records(records)


def scores_table(study: Study) -> pd.DataFrame:
    """One row per question, role and control (none first): r_blind with interval, n readings and the unpatched probabilities.

    Of the readings themselves also r_blind less that of the control that leaves the least (less, less_low, less_high, against).
    """
    records, rows = [], _all_readings(study)
    for (question, role, control), group in rows.groupby(["interpretation", "role", "control"], sort=False):
        low, high = blind_interval(group)
        records.append({"question": question, "role": role, "control": control, "n": n_readings(group), "layers": group["layer"].nunique(),
                        "r_blind": group["blind"].mean(), "low": low, "high": high, "d_group": group["d_group"].mean(),
                        **{name: group[name].mean() for name in ("d_other", "base_group", "base_other")}})
    less = less_controls(rows, ("interpretation", "role")).rename(columns={"interpretation": "question"}).drop(columns="n")
    return pd.DataFrame.from_records(records).merge(less.assign(control=""), on=["question", "role", "control"], how="left")


def _instrument_rows(study: Study) -> pd.DataFrame:
    """Readings by every instrument: the patchscope's first question and the parts `reading_*`, with a column `panel`."""
    names = [f"awareness_{role}_{QUESTION}" for role in ROLES]
    names += [f"reading_{name}_{role}" for name in INSTRUMENTS for role in ROLES]
    rows = study.rows(names)
    return rows.assign(panel=rows["instrument"].str.replace("_", " "))


def instruments_table(study: Study) -> pd.DataFrame:
    """One row per instrument, role and control: mean reading (-1 the group sense, 1 the other) with its interval, n readings; of the
    readings themselves also what is left of them beyond their control, see `scores_table`."""
    rows = _instrument_rows(study)
    less = less_controls(rows, ("panel", "role")).drop(columns="n").assign(control="")
    return summarise_readings(rows, by=("panel", "role", "control")).merge(less, on=["panel", "role", "control"], how="left")


def instrument_layers_table(study: Study) -> pd.DataFrame:
    """One row per instrument, role and layer: mean reading with its interval, n readings (no controls)."""
    return summarise_readings(readings_of(_instrument_rows(study)), by=("panel", "role", "layer"))


def open_readings_table(study: Study) -> pd.DataFrame:
    """One row per role and control: how many open-ended readings were of each sense or none, with shares and their intervals."""
    return selfie_table(study.rows(f"reading_selfie_{role}" for role in ROLES), study.concept, by=("role", "control"))


def probes_table(study: Study) -> pd.DataFrame:
    """One row per role and layer: accuracy of the sense probe on sentences it was not trained on, beside its control probes."""
    rows = readings_of(study.rows(f"reading_probes_{role}" for role in ROLES))
    shown = [name for name in ("tested", "accuracy", "accuracy_low", "accuracy_high", "accuracy_shuffled", "accuracy_untrained",
                               "accuracy_bag_of_words", "selectivity", "no_reading") if name in rows]
    return rows.drop_duplicates(["role", "layer"])[["role", "layer", *shown]].reset_index(drop=True)


def steering_table(study: Study) -> pd.DataFrame:
    """Implicit answers: the untreated row, then one row per sense or control and window of layers, by the window's first layer.

    Noise has one row a window, of all its draws: `draws`, and the least and largest rate of one (`draw_low`, `draw_high`). displacement and
    kl_prompts are the treatment's (see `treatment_effects`), of noise their means; NaN where they were not measured.
    """
    rows = study.rows(["behaviour_aligned", *steering_parts(study), *noise_parts(study)])
    rows = rows[rows["kind"] == "implicit"]
    table = summarised(rows, ("family", "sense", "layers"))
    table["start"] = [int(layers.split("-")[0]) if layers else -1 for layers in table["layers"]]
    by = ["family", "sense", "layers"]
    valid = rows[rows["outcome"].isin(["stereotyped", "reversed"])]
    rates = valid.assign(rate=valid["outcome"].eq("stereotyped")).groupby([*by, "treatment"], as_index=False)["rate"].mean()
    drawn = rates.groupby(by)["rate"].agg(draws="size", draw_low="min", draw_high="max").reset_index()
    table = table.merge(drawn, on=by, how="left").fillna({"draws": 0})
    for name in ("displacement", "kl_prompts"):
        means = rows.groupby(by)[name].mean() if name in rows else None    # a former version did not measure it
        table[name] = math.nan if means is None else [float(means.loc[tuple(row[key] for key in by)]) for row in table.to_dict("records")]
    return _ordered(table, sense=("", *steering_names(study.concept), MATCHED_NOISE), start=sorted(table["start"].unique()))


def lora_table(study: Study) -> pd.DataFrame:
    """Implicit and explicit answers: the untreated aligned model, then each layer group that was fine-tuned."""
    rows = study.rows(["behaviour_aligned", *lora_parts(study)])
    table = summarised(rows, ("treatment", "kind"))
    table.insert(1, "label", [name.removeprefix("lora_") for name in table["treatment"]])
    return table


def training_table(study: Study) -> pd.DataFrame:
    """What each adapter's training.json says: layers, examples, parameters, losses, seconds."""
    records = []
    for group in LAYER_GROUPS:
        note = study.folder / "adapters" / f"lora_{group}" / "training.json"
        if is_file(note):
            needs = ("layers", "loss", "examples", "examples_dropped", "parameters", "seconds")
            found = read_object(note, "", ResultError, needs=needs, advice="delete its folder to train the adapter anew")
            losses = found.get("losses") or [math.nan]
            records.append({"group": group, "layers": layers_text(found["layers"]), "first_loss": losses[0],
                            "last_loss": losses[-1], "mean_loss": found["loss"], **{key: found[key] for key in (
                                "examples", "examples_dropped", "parameters", "seconds")}})
    return pd.DataFrame.from_records(records)


def treatments_table(study: Study) -> pd.DataFrame:
    """One row per model and treatment that has both answers and readings: see `comparison_table`, with labels."""
    treated = [name for name in (*steering_parts(study), *lora_parts(study)) if study.has(f"{name}_awareness")]
    rows = []
    for role, names in (("base", []), ("aligned", treated)):
        answers = study.rows([f"behaviour_{role}", *names])
        readings = study.rows([f"awareness_{role}_{QUESTION}", *(f"{name}_awareness" for name in names)])
        if len(answers) and len(readings):
            table = comparison_table(answers, readings)
            about = answers.drop_duplicates("treatment").set_index("treatment")
            table.insert(0, "label", [_label(study, role, name, about.loc[name]) for name in table["treatment"]])
            rows.append(table)
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def audit_table(study: Study) -> pd.DataFrame:
    """Claim -> estimate -> interval -> controls -> revision: what alignment did, and whether each treatment lowers implicit bias.

    Placebos of a steering window are those that were steered in it, each draw of its noise among them; LoRA has none in a study
    (`alignblind compare` trains one).
    """
    revision = _revision(study)
    aligned, base = study.rows(["behaviour_aligned"]), study.rows(["behaviour_base"]).assign(treatment="base")
    readings = [study.rows([f"awareness_base_{QUESTION}"]).assign(treatment="base"), study.rows([f"awareness_aligned_{QUESTION}"])]
    read = pd.concat(readings) if all(map(len, readings)) else pd.DataFrame()
    records = alignment_claims(pd.concat([base, aligned]), read, revision, qualified=study.qualified) if len(base) else []
    treated = study.rows([*steering_parts(study), *noise_parts(study), *lora_parts(study)])
    if len(treated):
        records += _treatment_claims(study, pd.concat([aligned, treated]), revision)
    return pd.DataFrame.from_records(records)


def _treatment_claims(study: Study, answers: pd.DataFrame, revision: str) -> list[dict[str, Any]]:
    """A claim of each compared window and each adapter."""
    implicit = answers[answers["kind"] == "implicit"]
    about = {str(name): rows.iloc[0] for name, rows in implicit.groupby("treatment", sort=False)}
    wanted = [name for name, row in about.items() if row.get("family") == "lora"
              or (row.get("family") == "steering" and row["layers"] in study.compared)]
    kept = implicit[implicit["treatment"].isin(["untreated", *wanted])]
    differences = rows_by(corrected(paired_differences(kept, by=("kind",)))) if wanted else {}
    out = []
    for name in wanted:
        layers = str(about[name]["layers"])
        placebos = [other for other, row in about.items() if row.get("family") == "placebo" and row["layers"] == layers]
        row = differences[name]
        more = max(_invalid(answers, name, kind) - _invalid(answers, "untreated", kind) for kind in ("implicit", "explicit"))
        out.append(treatment_claim(implicit, name, row, placebos if about[name]["family"] == "steering" else [], more, revision,
                                   label=_label(study, "aligned", name, about[name]), qualified=study.qualified,
                                   competence=study.competence_of(name)))
    return out


def _invalid(answers: pd.DataFrame, treatment: str, kind: str) -> float:
    """The share of invalid answers; 0 where none of the kind was asked."""
    outcomes = answers.loc[(answers["treatment"] == treatment) & (answers["kind"] == kind), "outcome"]
    return float((outcomes == "invalid").mean()) if len(outcomes) else 0.0


def methods_paragraph(study: Study) -> str:
    """A paragraph that a paper can start from; empty for a study without the aligned model's answers."""
    if not study.has("behaviour_aligned"):
        return ""
    rows, note = study.rows(["behaviour_aligned"]), study.parts["behaviour_aligned"].provenance
    opening = methods_opening(study.config, rows[rows["kind"] == "implicit"], _revision(study), "each in the order of the paper",
                              read=len(readings_in(study)) > 0)
    said = ("Steering replaces the identifiers' residual stream in windows of layers, beside placebo phrases"
            + (" and noise that displaces the stream as much" if noise_parts(study) else "") + ". ")
    steered = said if steering_parts(study) else ""
    return (f"{opening}{study.config['base']['name']} was asked the same. Differences are paired by item, with intervals clustered over "
            "word pairs and templates (Cameron, Gelbach and Miller, 2011; Banerjee, 1960), and p-values corrected after "
            f"Holm (1979). {steered}"
            f"{software(note.get('versions', {}))}")


def _revision(study: Study) -> str:
    """The weights of the aligned model."""
    return str(study.config.get("aligned_revision") or "not recorded")


def summarised(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """`summarise` with the mean log-odds of each group and its interval (NaN for explicit answers), and how many of its items have scored
    answers, and improbable ones (`improbable_share`)."""
    groups = [group for _, group in rows.groupby(list(by), sort=False, dropna=False)]
    means = [group["log_odds"].mean() for group in groups]
    ends = [column_interval(group, "log_odds") if group["log_odds"].notna().all() else (math.nan, math.nan) for group in groups]
    table = pd.concat([summarise(group, by=by) for group in groups], ignore_index=True)
    table = table.join(pd.DataFrame([improbable_share(group) for group in groups]))
    return table.assign(log_odds=means, log_odds_low=[low for low, _ in ends], log_odds_high=[high for _, high in ends])


def _ordered(table: pd.DataFrame, **orders: Sequence[Any]) -> pd.DataFrame:
    """The table sorted by columns whose values have an order of their own."""
    ranks = {name: {value: i for i, value in enumerate(order)} for name, order in orders.items()}
    keys = pd.DataFrame({name: table[name].map(rank) for name, rank in ranks.items()})
    return table.loc[keys.sort_values(list(orders), kind="stable").index].reset_index(drop=True)


def _all_readings(study: Study) -> pd.DataFrame:
    """Readings of both models by every question, and their controls."""
    return study.rows(f"awareness_{role}_{question}" for question in study.concept.interpretations for role in ROLES)


def readings_in(study: Study) -> pd.DataFrame:
    """Readings of both models by every question, without controls."""
    rows = _all_readings(study)
    return readings_of(rows) if len(rows) else rows


def steering_parts(study: Study) -> list[str]:
    """The finished parts in which the identifiers were steered, sense by sense."""
    return [name for sense in (steering_names(study.concept) if study.steered else []) for name in sorted(study.parts)
            if name.startswith(f"steering_{sense}_") and not name.endswith("_awareness")]


def noise_parts(study: Study) -> list[str]:
    """The finished parts in which noise did as much as steering; none in a study of a former version."""
    return [name for name in sorted(study.parts) if name.startswith(f"{NOISE}_")] if study.steered else []


def lora_parts(study: Study) -> list[str]:
    """The finished parts with an adapter."""
    return [f"lora_{group}" for group in LAYER_GROUPS if study.has(f"lora_{group}")]


def _label(study: Study, role: str, treatment: str, about: pd.Series) -> str:
    if about["family"] == "untreated":
        return role if role == "base" else f"{role}, untreated"
    if about["family"] == "lora":
        return "LoRA " + treatment.removeprefix("lora_")
    what = "steering" if about["family"] == "steering" else "placebo"
    return f"{what}: {about['sense']}, {study.compared.get(about['layers'], 'layers')} {layer_range(about['layers'])}"


def layer_range(layers: str) -> str:
    """Layers as a page writes them: 1–3."""
    return layers.replace("-", "–")
