"""Knows at once when another process of the run has died.

A collective that a dead process should have joined never ends, and jax needs a minute and a half to notice. Here every
process holds a connection to process 0 that nobody writes to: when a process ends, however it ends, the system closes
its side; process 0 then tells the others which one it was.
"""
import logging
import socket
import threading

import jax

from unimiss_jax import processes

CONNECT_S = 60


class Lifeline:
  """`lost`: the process that has ended, 'process 3', or None as long as all live. Every process must make one."""

  def __init__(self):
    self.lost = None
    self._peers = []
    if jax.process_count() == 1:
      return
    server = socket.create_server(('', 0), backlog=jax.process_count()) if processes.main() else None
    here = server and [*socket.gethostbyname_ex(socket.gethostname())[2], '127.0.0.1']
    hosts, port = processes.gather((here, server and server.getsockname()[1]))[0]
    if server:
      server.settimeout(CONNECT_S)
      self._thread(self._accept, server)
    else:
      self._thread(self._hold, hosts, port)

  def close(self):
    """The others of this process's connections hear of its end."""
    for peer in self._peers:
      peer.close()

  def _thread(self, f, *args):
    threading.Thread(target=f, args=args, daemon=True, name='lifeline').start()

  def _accept(self, server):
    """Process 0: a thread for each of the others."""
    try:
      for _ in range(jax.process_count() - 1):
        peer, _ = server.accept()
        peer.settimeout(None)
        self._peers.append(peer)
        self._thread(self._listen, peer)
    except OSError as e:
      logging.warning('a process did not connect (%s): its death will be noticed late', e)

  def _listen(self, peer):
    name = f'process {int.from_bytes(_read(peer, 4), "big")}'
    _read(peer, 1)
    if self.lost is None:
      self.lost = name
      for other in self._peers:
        try:
          other.sendall(name.encode())
          other.close()
        except OSError:
          pass

  def _hold(self, hosts, port):
    for host in hosts:
      try:
        peer = socket.create_connection((host, port), CONNECT_S / len(hosts))
      except OSError:
        continue
      peer.settimeout(None)
      self._peers.append(peer)
      peer.sendall(jax.process_index().to_bytes(4, 'big'))
      self.lost = _read(peer, 100).decode() or 'process 0'
      return
    logging.warning('process 0 cannot be reached at %s, port %s: the death of a process will be noticed late',
                    ' or '.join(hosts), port)


def _read(peer, n: int) -> bytes:
  """At most n bytes; fewer when the other side is gone."""
  out = b''
  try:
    while len(out) < n and (more := peer.recv(n - len(out))):
      out += more
  except OSError:
    pass
  return out
