/* Stands in for NVIDIA's driver: one environment variable per answer. */
#include <stdio.h>
#include <stdlib.h>

static int setting(const char *name, int otherwise)
{
	const char *value = getenv(name);

	return value ? atoi(value) : otherwise;
}

int cuInit(unsigned flags)
{
	(void)flags;
	return setting("FAKE_CUDA_ERROR", 0);
}

int cuDriverGetVersion(int *version)
{
	*version = setting("FAKE_CUDA_VERSION", 13000);
	return 0;
}

int cuDeviceGetCount(int *count)
{
	*count = setting("FAKE_CUDA_DEVICES", 1);
	return 0;
}

int cuDeviceGet(int *device, int ordinal)
{
	*device = ordinal;
	return 0;
}

int cuDeviceGetName(char *name, int length, int device)
{
	snprintf(name, (size_t)length, "Fake GPU %d", device);
	return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
	int capability = setting("FAKE_CUDA_CAPABILITY", 121);

	(void)device;
	*value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1;
	return 0;
}

int cuGetErrorString(int error, const char **text)
{
	*text = error == 100 ? "no CUDA-capable device is detected" : "some other error";
	return 0;
}
