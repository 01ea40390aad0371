"""Does a picture find its own volume, or the report of what it shows? Recall@k across modalities."""
import numpy as np

from unimiss_jax.evals import probe, prompts
from unimiss_jax.evals.knn import auroc, unit


def recall(query, gallery, k: int) -> float:
  """Share of queries whose own row of the gallery is among the k nearest by cosine; chance is k / N.

  Args:
    query, gallery: [N, E], row i belongs to the same patient; each is centred by its own mean.
    A tie with the own row counts against it.
  """
  q = unit(query, np.mean(query, 0))
  g = unit(gallery, np.mean(gallery, 0))
  similarity = q @ g.T
  own = np.diag(similarity)[:, None]
  rank = (~(similarity < own)).sum(1) - 1      # so written, features that are not numbers retrieve nothing
  return float((rank < k).mean())


def hit_at_1(query, gallery, query_class, gallery_class) -> float:
  """Share of queries whose nearest row of the gallery, by cosine, is of their class.

  Args:
    query, gallery: [N, E], [M, E].
    query_class, gallery_class: [N], [M] integers.
  """
  nearest = (unit(query, 0.) @ unit(gallery, 0.).T).argmax(1)
  return float((np.asarray(gallery_class)[nearest] == query_class).mean())


def precision_at(query, gallery, query_class, gallery_class, k: int) -> float:
  """Mean share of the k nearest rows of the gallery, by cosine, that are of the query's class; arguments as above."""
  nearest = np.argsort(-unit(query, 0.) @ unit(gallery, 0.).T, 1, kind='stable')[:, :k]
  return float((np.asarray(gallery_class)[nearest] == np.asarray(query_class)[:, None]).mean())


def studies(images, text, planes, known, features=None) -> dict[str, float]:
  """Scores of pictures, volumes and reports in one space.

  Args:
    images: {'xray', 'ct': [N, E]}.
    text: [K, E], a report of each class, in order.
    planes: [N, k] that were chosen in each volume.
    known: of data_pipelines.studies.tests: 'labels' {stream: [N]}, 'planes' [N, m] that show what reports tell,
      'attributes' [K, A] of the classes.
    features: {'xray', 'ct': [N, C]} before the common space, which a probe is fitted to; None = no probe.

  Returns:
    {'eval/...'}: R@1 of reports for images, and of volumes for pictures (never paired in training); the mean AUROC of
    attributes by what reports say of them, and by a linear probe fitted to the first half of the images; the share of
    the planes with a lesion that were chosen.
  """
  labels, classes = known['labels'], np.arange(len(text))
  out = {f'eval/{s}_to_text_r1': hit_at_1(x, text, labels[s], classes) for s, x in images.items()}
  out |= {f'eval/{s}_zero_shot_auc': prompts.attributes(x, text, known['attributes'], labels[s])
          for s, x in images.items()}
  for s, x in (features or {}).items():
    half, truth = len(x) // 2, known['attributes'][labels[s]]
    found = probe.ridge(x[:half], truth[:half], x[half:])
    out[f'eval/{s}_probe_auc'] = float(np.nanmean([auroc(a, b) for a, b in zip(found.T, truth[half:].T)]))
  out['eval/xray_to_ct_r1'] = hit_at_1(images['xray'], images['ct'], labels['xray'], labels['ct'])
  found = (np.asarray(planes)[:, :, None] == known['planes'][:, None]).any(1)
  return out | {'eval/slice_recall': float(found.mean())}
