"""The words of Keras, PyTorch and other programs, and what takes their place here.

Words are compared without case, `_`, `-` and what stands before a dot, so that `nn.MaxPool2d` is max_pool2d.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping


def _table(*entries: tuple[str, str]) -> dict[str, str]:
    """Make a table from (words, meaning): what a user writes, and what is to be written here, a name or a sentence. Of
    names divided by `|` the first counts that is possible at the place."""
    return {word: meaning for words, meaning in entries for word in words.split()}


_LOGITS = "leave it out: cross_entropy takes the outputs before a softmax (logits)"
_SHAPES = "leave it out: the data and the layers before give the shape"
_RANKS = "leave it out: mpirun -n N starts N ranks, and layout divides the work"
_GPU = "write device: gpu, or leave it out: device: auto takes a GPU where every rank has one"
_OWN = "there is none: layers with weights are linear, conv2d and residual"

_LAYERS = _table(
    ("dense fullyconnected fc affine innerproduct lazylinear", "linear"),
    ("conv convolution convolution2d lazyconv2d", "conv2d"),
    ("maxpool maxpooling maxpooling2d pool pooling", "max_pool2d"),
    ("avgpool averagepool averagepooling averagepooling2d meanpool", "avg_pool2d"),
    ("globalaveragepooling2d globalaveragepooling globalavgpool gap adaptiveavgpool2d", "global_avg_pool2d"),
    ("dropout1d dropout2d dropout3d spatialdropout2d alphadropout",
     "write dropout, which leaves out single values and not whole channels"),
    ("batchnorm1d batchnorm2d batchnormalization bn", "batch_norm"),
    ("layernormalization ln", "layer_norm"),
    ("groupnorm instancenorm2d rmsnorm", "there are batch_norm and layer_norm"),
    ("softmax logsoftmax", _LOGITS),
    ("logistic", "sigmoid"),
    ("input inputlayer", _SHAPES),
    ("reshape view", "there is none; flatten makes a row of an image"),
    ("add skip shortcut resblock basicblock bottleneck resnetblock", "residual"),
    ("lstm gru rnn embedding attention multiheadattention transformer", _OWN),
    ("activation", "write its name as a layer (relu), or as the option activation of linear or conv2d"),
    ("zeropadding2d zeropad2d", "write padding: same in the conv2d after it"),
    ("sequential", "leave it out: layers is the list"),
)  # fmt: skip
_LOSSES = _table(
    ("categoricalcrossentropy sparsecategoricalcrossentropy crossentropyloss softmaxcrossentropy ce xent nllloss nll",
     "cross_entropy"),
    ("bce bceloss bcewithlogits bcewithlogitsloss sigmoidcrossentropy binarycrossentropywithlogits",
     "binary_cross_entropy"),
    ("mse mseloss l2 l2loss squarederror regression", "mean_squared_error"),
)  # fmt: skip
_OPTIMIZERS = _table(
    ("momentum nesterov", "write sgd: {momentum: 0.9}, with nesterov: true if wanted"),
    ("gd gradientdescent", "sgd"),
)
_SCHEDULES = _table(
    ("steplr multisteplr stepdecay piecewiseconstant", "step"),
    ("exponentiallr exponentialdecay", "exponential"),
    ("cosineannealing cosineannealinglr cosinedecay cosinelr cosineannealingwarmrestarts", "cosine"),
    ("none fixed constantlr", "constant"),
    ("warmup linearwarmup", "write it as the option warmup_steps of any schedule"),
)
_ACTIVATIONS = _table(
    ("softmax logsoftmax", _LOGITS),
    ("none linear identity", "leave it out: no activation is the default"),
    ("logistic", "sigmoid"),
    ("lrelu", "leaky_relu"),
)
_DEVICES = _table(
    ("cuda nvidia", "gpu"),
    ("cuda0 cuda1 cuda2 cuda3 gpu0 gpu1 gpu2 gpu3",
     "write gpu: each rank takes one of the GPUs that its node has; CUDA_VISIBLE_DEVICES limits the choice"),
    ("mps tpu xpu rocm hip", "there are cpu and, of NVIDIA, gpu"),
)  # fmt: skip
_DTYPES = _table(
    ("bf16 brainfloat bfloat", "bfloat16"),
    ("tensorfloat32 tensorfloat", "tf32"),
    (
        "half float16 fp16 f16 amp mixed",
        "write bfloat16: with the range of float32 it needs no loss scaling",
    ),
    ("double fp64 f64", "float64"),
    ("single float fp32 f32", "float32"),
)
_DATA = _table(
    ("cifar", "cifar10"),
    ("emnistletters", "letters"),
    ("emnist", "there are letters, emnist_balanced, emnist_byclass, emnist_bymerge, emnist_digits and emnist_mnist"),
    ("cifar100fine", "cifar100"),
    ("fashion fmnist", "fashion_mnist"),
    ("h5 hdf h5py", "hdf5"),
    ("random fake dummy fakedata", "synthetic"),
    ("imagefolder images folder", "write hdf5, with a file that `nettorrent data import` makes of the folder"),
    ("csv npz npy numpy", "write hdf5, with a file that `nettorrent data import` makes of a .csv or .npz"),
)
_EXCHANGES = _table(
    ("ddp dataparallel sync synchronous average", "allreduce"),
    ("parameterserver ps", "there is no server: replicas agree by allreduce, gossip or elite"),
)
_REDUNDANCIES = _table(
    ("off no false disabled", "none"),
    ("on yes true copy copies mirror partner neighbour neighbor memory", "buddy"),
)
_KEYS = _table(
    # layers
    ("infeatures inchannels inputdim inputshape inputsize numfeatures normalizedshape batchinputshape", _SHAPES),
    ("outfeatures outputdim neurons hidden hiddensize nodes outputs", "units"),
    ("outchannels channels numfilters nfilters", "filters"),
    ("kernelsize ksize filtersize", "kernel|size"),
    ("poolsize window", "size"),
    ("strides", "stride"),
    ("p prob probability dropoutrate", "rate"),
    ("negativeslope alpha", "slope"),
    ("usebias", "bias"),
    ("init initializer kernelinitializer weightinit", "initial"),
    ("act nonlinearity activationfunction", "activation"),
    ("dilation dilationrate groups", "leave it out: conv2d has neither groups nor dilation"),
    # optimizers and schedules
    ("learningrate lr baselr initiallr", "lr|train.optimizer.adam.lr"),
    ("beta1 beta2 beta", "betas"),
    ("rho", "alpha"),
    ("epsilon", "eps"),
    ("weightdecay wd l2", "weight_decay|train.optimizer.adam.weight_decay"),
    ("momentum", "train.optimizer.sgd.momentum"),
    ("amsgrad", "leave it out: adam has no such variant"),
    ("stepsize decaysteps", "every_steps"),
    ("milestones", "write schedule: step, which lowers the rate at equal intervals"),
    ("gamma decayrate", "factor"),
    ("tmax", "leave it out: cosine spans the whole run"),
    ("etamin minlr", "write final, a fraction of lr"),
    ("warmup warmupepochs numwarmupsteps warmupratio", "warmup_steps"),
    ("classweight", "class_weights|model.loss.cross_entropy.class_weights"),
    ("labelsmoothing", "label_smoothing|model.loss.cross_entropy.label_smoothing"),
    # sections
    ("numepochs nepochs maxepochs epoch", "epochs|train.epochs"),
    ("maxsteps iterations maxiter numsteps step", "steps|train.steps"),
    ("batchsize batch minibatch minibatchsize bs", "batch_size|train.batch_size"),
    ("microbatch accumulategradbatches gradientaccumulationsteps", "micro_batches|train.micro_batches"),
    ("gradientclipval maxgradnorm gradclip clip clipvalue", "clip_norm|train.clip_norm"),
    ("earlystopping patience targetaccuracy", "stop_at|train.stop_at"),
    ("scheduler lrscheduler lrschedule", "schedule|train.schedule"),
    ("optim opt", "optimizer|train.optimizer"),
    ("criterion objective lossfunction lossfn", "loss|model.loss"),
    ("network net architecture", "model"),
    ("layer", "layers|model.layers"),
    ("dataset", "name|data.name"),
    ("datadir datapath path dir folder file filename", "root|data.root"),
    ("validationsplit valsplit valfraction validationfraction val", "validation|data.validation"),
    ("transform transforms augmentation", "augment|data.augment"),
    ("normalize normalization", "write mean and std under data"),
    ("shuffle", "leave it out: the rows are shuffled anew in every epoch"),
    ("metrics", "leave it out: loss and accuracy are always reported"),
    ("numworkers workers nproc nprocpernode worldsize processes nodes np n numgpus ngpus gpus devices", _RANKS),
    ("gpu cuda usecuda usegpu accelerator", _GPU),
    ("randomseed randomstate manualseed", "seed"),
    ("precision floatx mixedprecision", "dtype"),
    ("logdir outdir outputdir savedir savepath workdir checkpointdir", "output"),
    ("verbose loginterval logevery logeverynsteps printevery", "report_every|train.report_every"),
    ("saveevery savesteps checkpointinterval checkpointfreq", "write every_steps or every_epochs under checkpoint"),
    ("evalevery valinterval checkvaleverynepoch", "evaluate_every|train.evaluate_every"),
    ("strategy parallelism tensorparallel dataparallel tpsize ppsize", "layout"),
    ("faulttolerance resilience elastic replication ulfm", "redundancy"),
    ("defaults", "leave it out: a configuration is one file; --set changes a value"),
)  # fmt: skip
_WORDS: dict[str, Mapping[str, str]] = {
    "layer": _LAYERS, "loss": _LOSSES, "optimizer": _OPTIMIZERS, "schedule": _SCHEDULES, "exchange": _EXCHANGES,
    "activation": _ACTIVATIONS, "device": _DEVICES, "dtype": _DTYPES, "data": _DATA, "key": _KEYS,
    "kind of redundancy": _REDUNDANCIES,
}  # fmt: skip


def plainly(word: str) -> str:
    """Return a word as it is compared."""
    return re.sub(r"[\W_]", "", word.strip().rsplit(".", 1)[-1]).lower()


def nearest(word: str, known: Iterable[str], what: str = "", *, listed: bool = True) -> str:
    """Suggest a correction of an unknown word: the known one of the same meaning or the nearest one; otherwise all of
    them, or nothing if they are not to be `listed`. `what` it names is a kind of component, an option, or a key."""
    known = list(known)
    same = [each for each in known if plainly(each) == plainly(word)]
    longer = [each for each in known if each.startswith(f"{word}_")]
    if not same and len(longer) > 1:
        return f"did you mean {' or '.join(longer)}?"
    meaning = meant(word, known, what)
    if same or not meaning:
        close = same or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
        meaning = close[0] if close else ""
    if meaning:
        return meaning if " " in meaning else f"did you mean {meaning}?"
    return f"possible: {', '.join(known)}" if listed else ""


def meant(word: str, known: Iterable[str], what: str) -> str:
    """Return what is to be written in place of a word of other programs: one of `known`, a key of another section with
    dots, or a sentence; nothing if unknown."""
    found = _WORDS.get(what, {}).get(plainly(word), "")
    known = list(known)
    return next((each for each in found.split("|") if each in known or " " in each or "." in each), "")
