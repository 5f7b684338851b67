/* Starts a program if the GPU that it was compiled for is there, and stops with one line if not.
 *
 *     require-gpu text-embeddings-router --model-id ...
 *
 * TEI logs a warning and serves from the CPU when it cannot use the GPU, and /health stays green. This asks the driver
 * what TEI will ask it (device 0, its compute capability), so it needs neither nvidia-smi nor a writable file, and
 * then becomes the program: the same process, which gets the signals.
 *
 * TEI_ALLOW_CPU=true skips the check. It helps where the driver is there and the GPU is not: without the driver's
 * libcuda.so.1 TEI's CUDA build cannot be loaded at all.
 */
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if !defined(FIRST_CAPABILITY) || !defined(LAST_CAPABILITY) || !defined(OLDEST_DRIVER)
#error "FIRST_CAPABILITY and LAST_CAPABILITY (121) and OLDEST_DRIVER (12090) are not defined"
#endif

/* The part of NVIDIA's driver API that is used; its header is not needed to call it. */
enum { SUCCESS = 0, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };

static void *driver;

static void stop(const char *format, ...)
{
	va_list arguments;

	fputs("require-gpu: ", stderr);
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputs(".\n", stderr);
	exit(1);
}

static void *function(const char *name)
{
	void *found = dlsym(driver, name);

	if (!found)
		stop("the NVIDIA driver has no %s: install driver 575 or newer", name);
	return found;
}

/* What the driver calls an error, as in "no CUDA-capable device is detected". */
static const char *meaning(int error)
{
	int (*get)(int, const char **) = dlsym(driver, "cuGetErrorString");
	const char *text = NULL;

	return get && get(error, &text) == SUCCESS && text ? text : "unknown error";
}

static void require(int error, const char *what)
{
	if (error != SUCCESS)
		stop("the GPU cannot be used, %s says: %s (CUDA error %d); TEI_ALLOW_CPU=true would serve from the CPU",
		     what, meaning(error), error);
}

static void require_gpu(void)
{
	int version = 0, devices = 0, device = 0, major = 0, minor = 0, capability;
	char name[128] = "GPU";
	int (*init)(unsigned), (*driver_version)(int *), (*device_count)(int *), (*device_get)(int *, int);
	int (*device_name)(char *, int, int), (*attribute)(int *, int, int);

	driver = dlopen("libcuda.so.1", RTLD_NOW);
	if (!driver)
		stop("no GPU in this container, not even a driver (libcuda.so.1): ask for nvidia.com/gpu, and where "
		     "the driver still does not come, for the runtime class nvidia or docker's --gpus");
	init = function("cuInit");
	driver_version = function("cuDriverGetVersion");
	device_count = function("cuDeviceGetCount");
	device_get = function("cuDeviceGet");
	device_name = function("cuDeviceGetName");
	attribute = function("cuDeviceGetAttribute");

	require(init(0), "cuInit");
	require(driver_version(&version), "cuDriverGetVersion");
	require(device_count(&devices), "cuDeviceGetCount");
	if (devices < 1)
		stop("the driver shows no GPU in this container: ask for nvidia.com/gpu");
	require(device_get(&device, 0), "cuDeviceGet");
	device_name(name, sizeof name, device);
	require(attribute(&major, CAPABILITY_MAJOR, device), "cuDeviceGetAttribute");
	require(attribute(&minor, CAPABILITY_MINOR, device), "cuDeviceGetAttribute");
	capability = major * 10 + minor;
	if (capability < FIRST_CAPABILITY || capability > LAST_CAPABILITY)
		stop("%s has compute capability %d.%d, this image is for %d.%d to %d.%d: build it for the accelerator "
		     "that is there", name, major, minor, FIRST_CAPABILITY / 10, FIRST_CAPABILITY % 10,
		     LAST_CAPABILITY / 10, LAST_CAPABILITY % 10);
	if (version < OLDEST_DRIVER)
		stop("the driver is for CUDA %d.%d, this image needs %d.%d: install a newer driver",
		     version / 1000, version % 1000 / 10, OLDEST_DRIVER / 1000, OLDEST_DRIVER % 1000 / 10);
	fprintf(stderr, "require-gpu: %s, compute capability %d.%d, driver for CUDA %d.%d\n", name, major, minor,
		version / 1000, version % 1000 / 10);
}

int main(int argc, char **argv)
{
	const char *allow_cpu = getenv("TEI_ALLOW_CPU");

	if (argc < 2)
		stop("usage: require-gpu PROGRAM [ARGUMENT]...");
	if (allow_cpu && strcmp(allow_cpu, "true") == 0)
		fputs("require-gpu: TEI_ALLOW_CPU=true, not looking for a GPU\n", stderr);
	else
		require_gpu();
	execvp(argv[1], argv + 1);
	fprintf(stderr, "require-gpu: cannot start %s\n", argv[1]);
	return 127;
}
