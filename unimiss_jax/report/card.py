"""What a user must know about exported weights: the preprocessing contract, the training, and the model card."""
from __future__ import annotations

import json

import unimiss_jax
from unimiss_jax.porting import arch as architectures

RESEARCH = 'Research use only. Not a medical device; not for diagnosis, triage or treatment.'
PHANTOMS = 'built-in phantoms'
UNKNOWN = 'not recorded in the file that the weights came from'

NO_TASK = {'clip': (0., 0.), 'normalise': (0., 0.), 'spacing_mm': (0., 0., 0.)}      # a run that is not fine-tuning
# views.ct and views.xray of preset `plain`, for weights that do not say what they were trained on.
PLAIN = {'volume': {'size': (16, 96, 96), 'extent': 'output', 'resize': 'linear', 'pad_hu': -1024, 'record': 'tile',
                    'tile': 24, 'modality': 'ct', 'sequences': '', **NO_TASK},
         'image': {'size': 96, 'ratio': (3 / 4, 4 / 3), 'resize': 'bicubic', 'clip': (0., 0.), 'normalise': (0., 0.)}}
LOSSES_2D = 'drr', 'recon_drr', 'pair_nce', 'slice', 'slice_slice', 'ct_slice'      # of CT, that look at images
LOSSES = ('ct', 'drr', 'slice', 'slice_slice', 'ct_slice', 'xray', 'recon_ct', 'recon_drr', 'recon_xray', 'nce',
          'pair_nce')
TAGS = ('medical-imaging', 'chest-x-ray', 'self-supervised-learning', 'pytorch', 'jax',
        'safetensors')
TAG = {'ct': ('computed-tomography',), 'mr': ('magnetic-resonance-imaging',)}
Z_SCORE = ('of each sequence of a scan: clipped to the 0.5 and 99.5 percentiles of {}, minus the mean of that, over '
           'its deviation')
INTENSITY = {'ct': 'HU, clipped to [-1024, 3071], divided by 1024', 'mr': Z_SCORE.format('the voxels that are not 0'),
             'other': Z_SCORE.format('all voxels')}
DIMENSIONS = {2: '2D images', 3: '3D volumes'}
USE = '''import json, safetensors.torch, {file}
net = {file}.{network}(**json.load(open('config.json'))['torch']).eval()
net.load_state_dict(safetensors.torch.load_file('model.safetensors'))
output, logits = net(x)      # x [B, 3, H, W] or [B, 1, D, H, W] -> output.embedding, .pyramid, .reconstruction'''
SLICEWISE = ('A volume goes through the ResNet slice by slice. Its `output.embedding` is the unit mean of the tokens '
             'that the Transformer over the slices gives, `output.pyramid` the embeddings of the slices and those '
             'tokens; it has no logits. Any number of slices works.', '')
FILES = {'model.safetensors': 'the weights', 'config.json': 'architecture, preprocessing contract, training',
         'parity.json': 'JAX against PyTorch, stage by stage', 'torch_mit.py': 'the network in PyTorch, one file',
         **dict.fromkeys(('torch_mit_pilot.py', 'torch_resnet.py', 'torch_vit.py'),
                         'the network in PyTorch, one file'),
         'README.md': 'this card', 'model.pth': 'the weights as a PyTorch state_dict',
         'stablehlo': "the forward pass for `jax.export.deserialize(...).call(weights, x)`, native size, any batch; "
                      'needs jax and flatbuffers'}


def contract(config: dict) -> dict:
  """How inputs must look, from a run's config: in words, and as `view`, the leaves that make them; only of the kinds of
  input that it trained on."""
  model, data, views, task = config['model'], config['data'], config['views'], NO_TASK | config.get('task', {})
  channels = model.get('in_channels', (3, 1))[1]
  sequences = {'sequences': data['sequences']} if data.get('sequences') else {}
  common = {k: task[k] for k in ('clip', 'normalise')}
  record = 'scan' if 'task' in config or 'unimedi' in config else 'tile'
  low, high = task['clip']
  mean, std = task['normalise']
  asked = (f', clipped to [{low:g}, {high:g}]' if high > low else '') + (f', minus {mean:g}, divided by {std:g}' if std
                                                                        else '')
  out = {}
  if config['phases']['ct']:
    out['volume'] = {
        'tensor': f'[B, {channels}, D, H, W] float32', **sequences,
        'orientation': 'SAR: D runs to the superior, H to the anterior, W to the right side of the patient '
                       '(the closest such order by the affine of the file)',
        'spacing': (f'resampled to {" x ".join(f"{mm:g}" for mm in task["spacing_mm"])} mm (0 = as in the file)'
                    if any(task['spacing_mm']) else
                    f'as in the file, not resampled; trained on {data["ct"] or data.get("manifest") or PHANTOMS}'),
        'intensity': INTENSITY[data['modality']] if not asked else f'HU, clipped to [-1024, 3071]{asked}'
                     + ('' if std else ', divided by 1024'),
        'size': list(model.get('volume_size', views['ct']['size'])),
        'crop': _ct_crop(views['ct'], record),
        'view': {k: views['ct'][k] for k in ('size', 'extent', 'resize', 'pad_hu')} | common | {
            'record': record, 'tile': data.get('tile', 24), 'modality': data['modality'],
            'sequences': data.get('sequences', ''), 'spacing_mm': task['spacing_mm']}}
  if config['phases']['xray'] or config['phases']['ct'] and any(map(config.get('loss', {}).get, LOSSES_2D)):
    of = views['xray' if config['phases']['xray'] else 'drr']
    out['image'] = {
        'tensor': '[B, 3, H, W] float32, the grey value three times',
        'orientation': "as displayed: head up, the patient's right on the left",
        'intensity': 'MONOCHROME2 (bone is bright), full scale of the bit depth -> [0, 1]'
                     + (asked or '; no mean, no deviation'),
        'size': [model['image_size']] * 2,
        'crop': f'{of["scale"][0]:g} to {of["scale"][1]:g} of the area, resized to {of["size"]} x {of["size"]}',
        'view': {k: of[k] for k in ('size', 'ratio', 'resize')} | common}
  return out


def views(weights) -> tuple[dict, bool]:
  """The leaves by which inputs become what the network was trained on.

  Args:
    weights: `weights.Weights`.

  Returns:
    {'volume': ..., 'image': ...}, each `view` of `contract`, of the kinds of input that the weights are for; and
    whether they were recorded. Else they are those of preset `plain`, at the sizes of the position tables.
  """
  known = contract(weights.about['config']) if 'config' in weights.about else weights.about.get('preprocessing', {})
  found = {kind: rules['view'] for kind, rules in known.items() if 'view' in rules}
  sizes = {'volume': weights.arch.get('volume_size'), 'image': weights.arch.get('image_size')}
  given = found or {kind: leaves | ({'size': sizes[kind]} if sizes[kind] else {}) for kind, leaves in PLAIN.items()}
  return {kind: given[kind] for kind, n in (('volume', 3), ('image', 2)) if kind in given and n in weights.dimensions
          }, bool(found)


def training(weights) -> dict:
  """How the weights were made, from what lies in the run's folder.

  Args:
    weights: `weights.Weights` of a run.
  """
  about = weights.about
  config, meta, env = about['config'], about.get('meta', {}), about.get('env', {})
  records = meta.get('records', {})
  source = lambda s: config['data'][s] or PHANTOMS
  step = int(weights.source.rstrip('/').rpartition('/')[2]) if weights.source.rpartition('/')[2].isdigit() else None
  return {
      'method': config['method'], 'preset': config['preset'], 'step': step, 'modality': config['data']['modality'],
      'losses': {k: v for k, v in config['loss'].items() if k in LOSSES and v}, **_of_joint(config.get('joint')),
      'batch': {s: config['batch'][s] for s in records or ('ct', 'xray')},
      'samples_seen': meta.get('positions', {}),
      'data': {s: {'source': source(s), **records.get(s, {})} for s in ('ct', 'xray') if config['phases'][s]},
      'config_hash': meta.get('config_hash'), 'seed': config['seed'], 'devices': env.get('devices', []),
      'hosts': env.get('hosts'), 'init_from': config.get('init_from') or None,
      'versions': meta.get('versions') or env.get('packages', {}),
      'evaluation_set': config['eval']['knn'] or 'phantoms', 'evaluation': _evaluation(about.get('metrics', []), step)}


def _of_joint(joint) -> dict:
  if not joint:
    return {}
  return {'objective': joint['objective'],
          'phases': {n: f'{100 * s:.0f} %' for n, s in zip(joint['phases'], joint['shares'])}}


def _ct_crop(views, record: str) -> str:
  low, high = views['scale']
  if views['extent'] == 'record':
    return f'{low:g} to {high:g} of the {record} along each axis, resized to {" x ".join(map(str, views["size"]))}'
  if views['extent'] == 'centre':
    return f'the central {" x ".join(map(str, views["size"]))} voxels of the {record}, filled up where there are fewer'
  return f'{views["size"][0]} slices; in-plane {low:g} to {high:g} times {views["size"][1]} voxels, resized to that'


def _evaluation(metrics, step) -> dict:
  """The scores of this step, with those of the first step and of raw pixels; none, if it was not evaluated."""
  rows = [r for r in metrics if r.get('phase') == 'eval']
  now = [r for r in rows if r['step'] == step]
  if not now:
    return {}
  first, last = rows[0], now[-1]
  return {k: {'value': v, 'at_start': first.get(k), 'raw_pixels': first.get(k.replace('eval/', 'eval/raw_', 1))}
          for k, v in last.items() if k.startswith('eval/') and k.count('/') == 1 and not k.startswith('eval/raw_')}


def lines_of(file: str, network: str) -> str:
  """What a PyTorch user writes, with this file and class."""
  return USE.replace('{file}', file).replace('{network}', network)


def card(name: str, config: dict, parity: dict, files: list, license_id: str, data_license: str) -> str:
  """The README.md of an exported folder, with the front matter of model hubs.

  Args:
    name: of the model.
    config: what config.json holds.
    parity: what parity.json holds.
    files: names in the folder.
    license_id, data_license: of the weights; of what they were trained on.
  """
  known, how = config.get('preprocessing', {}), config.get('training', {})
  arch, net = config['torch']['arch'], config['torch']
  parts = ', '.join(p for p, there in (('encoder', True), ('decoder', net['decoder']), ('head', net['head']),
                                       ('Transformer over slices', net.get('inter'))) if there)
  twin = architectures.twin(arch)
  use = lines_of(twin.file, twin.network).replace('[B, 1,', f'[B, {arch["in_channels"][1]},')
  lines = [
      '---', f'license: {json.dumps(license_id)}', 'library_name: unimiss_jax',
      'pipeline_tag: image-feature-extraction',
      'tags:', *(f'- {tag}' for tag in TAGS + TAG.get(how.get('modality', 'ct'), ())), '---', '',
      f'# {name}', '', f'**{RESEARCH}**', '',
      f'{config["architecture"]} ({config["parameters"] / 1e6:.2f} M parameters: {parts}), '
      f'{_whose(config["branch"])}for {" and ".join(DIMENSIONS[n] for n in net["dimensions"])}. '
      f'Weights are {config["dtype"]}, in PyTorch layout, under the names of {_names(twin)}.', '',
      '## Use', '', 'In this folder, with PyTorch and safetensors installed:', '', '```python', use, '```', '',
      *(SLICEWISE if net.get('inter') else ()), _sizes(twin), '',
      '## Preprocessing contract', '']
  if known:
    for kind, rules in known.items():
      lines += [f'**{kind}**', '', *_rows(rules), '']
  else:
    lines += [f'{UNKNOWN.capitalize()}. The released UniMiSS+ code feeds volumes as HU / 1024 and images as grey '
              'values in [0, 1] three times, without mean and deviation.', '',
              f'Channels: images {arch["in_channels"][0]}, volumes {arch["in_channels"][1]}.', '']
  lines += ['## Training', '']
  if how:
    apart = 'data', 'evaluation', 'evaluation_set'
    lines += [*_rows({k: v for k, v in how.items() if k not in apart and v not in (None, {}, [])}), '',
              '| data | source | records | hash |', '| --- | --- | --- | --- |',
              *(f'| {s} | {_cell(d["source"])} | {d.get("count", "")} | {d.get("hash", "")} |'
                for s, d in how['data'].items()), '']
  else:
    lines += [UNKNOWN.capitalize() + '.', '']
  lines += [f'Licence of the training data: {data_license}.', '']
  if how.get('evaluation'):
    lines += ['## Results', '', 'Scores of the run itself, on its own evaluation set '
              f'({_cell(how["evaluation_set"])}); one seed, no interval.', '',
              '| score | value | at step 0 | raw pixels |', '| --- | --- | --- | --- |',
              *(f'| {k[5:]} | {_number(v["value"])} | {_number(v["at_start"])} | {_number(v["raw_pixels"])} |'
                for k, v in how['evaluation'].items()), '']
  lines += ['## Parity of JAX and PyTorch', '',
            f'Largest difference over the largest value of a stage, in float32 (JAX {parity["jax"]}, PyTorch '
            f'{parity["torch"]}; limit {parity["tolerance"]:g}; all stages in `parity.json`).', '',
            '| input | worst stage | difference |', '| --- | --- | --- |']
  for size, stages in parity['inputs'].items():
    worst = max(stages, key=lambda s: stages[s]['max_rel'])
    lines += [f'| {size} | {worst} | {stages[worst]["max_rel"]:.1e} |']
  limits = _limits(how, arch, net['head'], config['recorded'])
  lines += ['', '## Limits', '', *(f'- {text}' for text in limits), '', '## Files', '',
            *(f'- `{f}`: {FILES.get(f.rpartition(".")[2] if f not in FILES else f, "")}' for f in files), '',
            f'Made by unimiss_jax {unimiss_jax.__version__}.', '']
  return '\n'.join(lines)


def _limits(how, arch, head, recorded) -> list[str]:
  out = ['Results on patients of other scanners, ages or diseases than those of the training data are unknown.',
         'An embedding may carry what identifies a patient, sex, age or scanner; none of it was removed.']
  if how and not how['init_from'] and all(d['source'] == PHANTOMS for d in how['data'].values()):
    out.insert(0, 'Trained on drawings of a thorax alone: it shows that the machinery works and helps no patient.')
  if not recorded and 'num_heads' in arch:
    out.insert(0, 'The file that the weights came from does not record the heads and the depth of volumes: '
               f'num_heads {arch["num_heads"]}, decoder_heads {arch["decoder_heads"]} and volume_size '
               f'{arch["volume_size"]} are assumed. Parity cannot tell.')
  if head and not head['last_layer']:
    out.append('The head has no prototypes: `logits` are its projection.')
  if arch.get('cls_token', True) is False:
    out.append('Without a class token: the embedding is the mean of the last tokens.')
  return out


def _names(twin) -> str:
  if twin.file.startswith('torch_mit'):
    return f'the released {twin.network.replace("Plus", "+")} code'
  beside = ', which behind `backbone.` are those of torchvision' if twin.architecture == 'ResNet' else ''
  return f'`{twin.file}.py`{beside}'


def _sizes(twin) -> str:
  if twin.architecture == 'ResNet':
    return 'Images, and slices of volumes, of any size of at least 32 x 32 work.'
  return 'Sizes other than the native ones work: position tables are interpolated on their grid.'


def _whose(branch) -> str:
  return f'the {branch} of its training, ' if branch else ''


def _rows(named: dict) -> list[str]:
  return ['| | |', '| --- | --- |', *(f'| {k.replace("_", " ")} | {_cell(v)} |' for k, v in named.items())]


def _cell(value) -> str:
  if isinstance(value, dict):
    value = ', '.join(f'{k} {v}' for k, v in value.items())
  elif isinstance(value, (list, tuple)):
    words = sorted(set(map(str, value)))
    value = ' x '.join(map(str, value)) if all(isinstance(v, int) for v in value) else ', '.join(words)
  return str(value).replace('|', '\\|').replace('\n', ' ')


def _number(value) -> str:
  return '' if value is None else f'{value:.3f}'
