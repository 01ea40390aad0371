"""The radiologist's paragraph about a phantom, in varying words. Chosen by us."""
import numpy as np

PHRASES = {
    'nodule': (('There is a linear or plate-like opacity in the lung.',
                'An elongated, band-like opacity is seen; no round nodule.',
                'Band of dense tissue, not rounded, in the aerated lung.'),
               ('There is a round nodule in the lung.',
                'A well-defined spherical pulmonary nodule is present.',
                'Solitary rounded nodular opacity.')),
    'effusion_side': (('Left pleural effusion, none on the right.',
                       'The left costophrenic angle is blunted by fluid; the right angle is clear.',
                       'Layering fluid in the left pleural space.'),
                      ('Right pleural effusion, none on the left.',
                       'The right costophrenic angle is blunted by fluid; the left angle is clear.',
                       'Layering fluid in the right pleural space.')),
    'cardiomegaly': (('Heart size is normal.',
                      'The cardiac silhouette is not enlarged.',
                      'No cardiomegaly.'),
                     ('The heart is enlarged.',
                      'Enlarged cardiac silhouette.',
                      'There is cardiomegaly.')),
    'scoliosis': (('The spine is straight.',
                   'Normal spinal alignment.',
                   'No scoliosis.'),
                  ('There is a lateral curvature of the thoracic spine.',
                   'Scoliosis of the thoracic spine.',
                   'The spine is curved to the side.')),
    'reticular': (('The lung texture is homogeneous without reticulation.',
                   'No interstitial abnormality.',
                   'No reticular pattern.'),
                  ('Fine reticular pattern throughout both lungs.',
                   'Diffuse interstitial reticulation.',
                   'Reticular opacities are present bilaterally.')),
}
CONSOLIDATION = ('There is consolidation in the {side} {lobe} lobe.',
                 'Airspace opacity occupies part of the {side} {lobe} lobe.',
                 '{Side} {lobe} lobe consolidation.')
OPENINGS = ('', '', 'Frontal view of the chest.', 'Chest examination.', 'Comparison: none.')


def report(phantom, seed: int, index: int) -> str:
  """One paragraph that states every finding, present or absent, in a random order and wording."""
  rng = np.random.default_rng([seed, index, 2])
  pick = lambda choices: choices[rng.integers(len(choices))]
  labels = phantom.labels
  sentences = [pick(PHRASES[name][labels[name]]) for name in PHRASES]
  side = ('left', 'right')[labels['consolidation_side']]
  lobe = ('lower', 'upper')[labels['consolidation_lobe']]
  sentences.append(pick(CONSOLIDATION).format(side=side, Side=side.capitalize(), lobe=lobe))
  order = rng.permutation(len(sentences))
  return ' '.join([pick(OPENINGS), *(sentences[i] for i in order)]).strip()
